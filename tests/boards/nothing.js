// What stands for Grafana's code editors, which no panel of a dashboard uses.
export default {};
export const loader = { config() {} };
