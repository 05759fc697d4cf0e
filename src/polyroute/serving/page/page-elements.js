// Elements and sentences. Names of tasks, answers and errors are text, and never become HTML.

export const byId = (id) => document.getElementById(id);

export function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The server's messages begin with a small letter and have no full stop.
export function sentence(text) {
  const whole = String(text).trim();
  if (!whole) return "";
  return whole[0].toUpperCase() + whole.slice(1) + (/[.!?…]$/.test(whole) ? "" : ".");
}

// Tell something at a place that is kept for it; null tells nothing.
export function tell(element, text, isError = false) {
  element.textContent = text === null ? "" : sentence(text);
  element.classList.toggle("error", isError);
}

export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
