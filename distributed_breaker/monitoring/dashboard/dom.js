// Making and changing elements. Whatever comes from the server gets into the page here, and only as
// text or as the value of an attribute that can't run anything.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Children are elements, or anything else as text; null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of SVG. */
export function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** The symbol of a state: a shape of its own, so that colour is never alone. */
export function mark(state) {
  return s(
    "svg",
    { class: "mark", "data-state": state, "aria-hidden": "true" },
    s("use", { href: `#i-${state}` }),
  );
}

export function setMark(element, state) {
  if (element.dataset.state === state) return;
  element.dataset.state = state;
  element.firstChild.setAttribute("href", `#i-${state}`);
}

/** Change a text only when it differs: a write of the same text would cost a layout. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Let a parent's children be exactly these, in this order, moving no more than needed.
 *  An element that is moved would lose the focus, so it gets it back. */
export function arrange(parent, children) {
  const focused = document.activeElement;
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  let next = parent.firstElementChild;
  for (const child of children) {
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
  }
  if (focused !== document.activeElement && focused.isConnected)
    focused.focus({ preventScroll: true });
}
