// What stands for react-custom-scrollbars-2, whose default a bundler does not find: a picture is not scrolled.
export default function Scrollbars({ children, style }) {
  return <div style={{ ...style, position: "relative", overflow: "hidden", width: "100%", height: "100%" }}>{children}</div>;
}
