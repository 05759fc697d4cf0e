// Examples as they are pasted: lines of input, tab and target, or JSON Lines.

export class Fault extends Error {
  // `line` counts from 1.
  constructor(line, message) {
    super(`line ${line}: ${message}`);
    this.line = line;
  }
}

// The examples of a text. Lines without text are passed over.
export function examplesOf(text) {
  const lines = text.replace(/^\uFEFF/, "").split(/\r\n|\n|\r/);
  const first = lines.find((line) => line.trim());
  const read = first?.trimStart().startsWith("{") ? fromJson : fromTab;
  return lines.flatMap((line, i) => (line.trim() ? [read(line, i + 1)] : []));
}

function fromTab(line, number) {
  const parts = line.split("\t");
  if (parts.length < 2) throw new Fault(number, "there is no tab between an input and its target");
  if (parts.length > 2) throw new Fault(number, "there is more than one tab; JSON Lines can have tabs in texts, as \\t");
  const [input, target] = parts;
  if (!input.trim()) throw new Fault(number, "there is no input before the tab");
  if (!target.trim()) throw new Fault(number, "there is no target behind the tab");
  return { input, target };
}

function fromJson(line, number) {
  let example;
  try {
    example = JSON.parse(line);
  } catch {
    throw new Fault(number, "this is not valid JSON; the first line begins with {, so each line must be a JSON object");
  }
  if (example === null || typeof example !== "object" || Array.isArray(example)) {
    throw new Fault(number, "this must be a JSON object, such as {\"input\": \"2 + 2\", \"target\": \"4\"}");
  }
  for (const field of ["instruction", "input", "target"]) {
    if (field in example && typeof example[field] !== "string") throw new Fault(number, `"${field}" must be a text in quotes`);
  }
  if (!example.target) throw new Fault(number, '"target" is missing or empty');
  if (!example.input && !example.instruction) throw new Fault(number, '"input" and "instruction" are both missing or empty');
  const { choices } = example;
  if (choices !== undefined && choices !== null) {
    if (!Array.isArray(choices) || !choices.every((choice) => typeof choice === "string")) {
      throw new Fault(number, '"choices" must be a list of texts');
    }
    if (!choices.includes(example.target)) throw new Fault(number, '"target" is none of its "choices"');
  }
  return example;
}
