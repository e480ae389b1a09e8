// The few things that every part of the page does with the document. Text from outside (request ids, labels, reasons)
// only ever becomes text: as a child or through setText, never as markup.

/**
 * The page's element with this id, which is of this class.
 * @template {Element} [T=HTMLElement]
 * @param {string} id
 * @param {new () => T} [kind]
 * @returns {T}
 */
export function at(id, kind = /** @type {new () => any} */ (HTMLElement)) {
  const node = document.getElementById(id);
  if (node instanceof kind) return node;
  throw new Error(`#${id} is ${node}, not the ${kind.name} that the page needs`);
}

/**
 * A new element with these properties and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Partial<HTMLElementTagNameMap[K]>} [properties]
 * @param {...(Node | string)} children
 */
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/**
 * A new SVG element with these attributes and children.
 * @template {keyof SVGElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 */
export function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAttributes(node, attributes);
  node.append(...children);
  return node;
}

/**
 * Sets what differs: setting what is set already has the browser lay it out again.
 * @param {Element} node
 * @param {Record<string, string | number>} attributes
 */
export function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
  }
}

/**
 * Sets the text where it differs.
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent === text) return;
  if (node.firstChild instanceof Text) node.firstChild.data = text;
  else node.textContent = text;
}

/** A fact of a dialog, in words. @param {string} name @param {string} value */
export function fact(name, value) {
  return make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
}

/** What stands where there is nothing to show. @param {string} textContent */
export function emptyNote(textContent) {
  return make("p", { className: "empty", textContent });
}

/**
 * One row of a list, and how to show an item in it.
 * @template Item
 * @typedef {{ node: Element, update: (item: Item) => void }} Row
 */

/**
 * A list whose rows follow items, told apart by their keys.
 *
 * Rows are updated in place, so that neither the keyboard's focus nor a selection is lost at a refresh. A row that is
 * no longer wanted serves the next item that comes: thousands that wait to be collected are much memory.
 * @template Item
 * @param {Element} parent
 * @param {(item: Item) => string} keyOf
 * @param {() => Row<Item>} create
 * @returns {(items: Item[]) => void} shows these items, in this order
 */
export function liveList(parent, keyOf, create) {
  /** @type {Map<string, Row<Item>>} */
  const rows = new Map();
  /** @type {Row<Item>[]} */
  const spare = [];
  return (items) => {
    const wanted = new Map(items.map((item) => [keyOf(item), item]));
    for (const [key, row] of rows) {
      if (wanted.has(key)) continue;
      row.node.remove();
      rows.delete(key);
      spare.push(row);
    }
    let next = parent.firstElementChild;
    for (const [key, item] of wanted) {
      const row = rows.get(key) ?? spare.pop() ?? create();
      rows.set(key, row);
      row.update(item);
      if (row.node === next) next = next.nextElementSibling;
      else parent.insertBefore(row.node, next);
    }
  };
}
