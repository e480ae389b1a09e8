// What the page asks of the collector. The types of the answers are generated from the collector's own schema.

/** @import { Answers } from "./answers.d.ts" */

const TIMEOUT_MS = 8000;

/** There is no answer. */
export class NoAnswer extends Error {}

/** The collector will not answer this, or has no such thing; the message is its own. */
export class Refused extends NoAnswer {}

/**
 * The answer at a path. Parameters that the path names go into it, the others behind it as the query. The address is
 * relative, so that the page also works below a prefix that a proxy takes away.
 * @template {keyof Answers} P
 * @param {P} path
 * @param {Record<string, string | number>} [parameters]
 * @returns {Promise<Answers[P]>}
 * @throws {NoAnswer}
 */
export async function get(path, parameters = {}) {
  const query = new URLSearchParams();
  let address = path.slice(1);
  for (const [name, value] of Object.entries(parameters)) {
    if (path.includes(`{${name}}`)) address = address.replace(`{${name}}`, () => encodeURIComponent(value));
    else query.set(name, String(value));
  }
  if (query.size) address += `?${query}`;
  const { ok, status, body } = await fetched(address);
  if (ok) return body;
  throw new Refused(typeof body.detail === "string" ? body.detail : `status ${status}`);
}

/**
 * @param {string} address
 * @returns {Promise<{ ok: boolean, status: number, body: any }>}
 */
async function fetched(address) {
  try {
    const response = await fetch(address, { signal: AbortSignal.timeout(TIMEOUT_MS) });
    return { ok: response.ok, status: response.status, body: await response.json() };
  } catch (error) {
    throw new NoAnswer(error instanceof Error ? error.message : String(error));
  }
}
