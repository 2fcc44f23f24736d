// Drawing: one numbered request at a time and place, the newest wins, and Stop ends all that came before it.

import {Refused, blobOf, lines, post} from "./util.js";

export const session = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`.replace(/\D/g, "-");
let number = 0;
const running = new Set();

export const busy = () => running.size > 0;

/** Images of a request. Resolves to a list of {url, blob, settings}; null where something else took its place.
 *
 * `place` is what is drawn into: a further request there ends the one before. Throws Refused with a sentence.
 */
export async function draw(place, request, {n = 1, live = false, embed = true, onstep = null} = {}) {
  for (const other of running) if (other.place === place) end(other);
  const mine = {place, number: ++number, control: new AbortController(), ended: false};
  running.add(mine);
  announce();
  const shots = [];
  try {
    for await (const line of lines("/api/generate", {request, session, number: mine.number, n, live, embed}, mine.control.signal)) {
      if (mine.ended) return null;
      if (line.error) throw new Refused(line.error.message, line.error.type);
      if (line.png) {
        const blob = blobOf(line.png);
        shots.push({blob, url: URL.createObjectURL(blob), settings: line.settings});
      } else if (line.of) onstep?.(line.step, line.of);
    }
    return mine.ended ? null : shots;
  } catch (error) {
    if (mine.ended || error.name === "AbortError" || error.type === "cancelled") return null;
    throw error;
  } finally {
    running.delete(mine);
    announce();
  }
}

function end(one) {
  one.ended = true;
  one.control.abort();
}

/** End what is drawn in a place, such as a teacher while somebody types. */
export function leave(place) {
  for (const one of running) if (one.place === place) end(one);
}

/** End everything of this tab, also what is still on its way to the server. */
export async function stop() {
  const last = number;
  for (const one of running) end(one);
  try {
    await post("/api/stop", {session, number: last});
  } catch { /* The server is gone, and with it what it drew. */ }
}

const listeners = new Set();
export const onbusy = (listener) => listeners.add(listener);
const announce = () => listeners.forEach((listener) => listener(busy()));
