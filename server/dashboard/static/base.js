// What every page uses: elements, words for numbers and times, questions to the API, news from the server.

/** An element; text is only ever text, so that no name from a site can be markup. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

export async function ask(path, options = {}) {
  const answer = await fetch(path, {headers: {Accept: 'application/json'}, ...options});
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(answer.status === 401
    ? 'You are signed out: open the address that “consilium dashboard” printed.'
    : typeof content.detail === 'string' ? content.detail : `The server answered ${answer.status}.`);
  return content;
}

/** Put new content in place only if it differs, so that what has the focus keeps it. */
export function fill(place, content, state) {
  const text = JSON.stringify(state);
  if (state !== undefined && place.dataset.state === text) return false;
  place.dataset.state = text ?? '';
  place.replaceChildren(...[content()].flat().filter(child => child !== null && child !== undefined));
  return true;
}

const NONE = '–';
const isNumber = value => typeof value === 'number' && Number.isFinite(value);

/** As the report writes it: three decimals without the leading zero, or three significant figures of a measure. */
export function number(value, words) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  let text;
  if (words?.figures && size) {
    const place = Math.floor(Math.log10(Number(size.toPrecision(3))));
    text = place > -6 ? Number(size.toPrecision(3)).toLocaleString('en',
      {minimumFractionDigits: Math.max(2 - place, 0), maximumFractionDigits: Math.max(2 - place, 0)}) : size.toExponential(2);
  } else text = size.toFixed(3);
  return (value < 0 && Number(text) ? '−' : '') + text.replace(/^0\./, '.');
}

export function withInterval(figure, words) {
  if (!figure || !isNumber(figure.value)) return NONE;
  const interval = isNumber(figure.low) && isNumber(figure.high);
  return number(figure.value, words) + (interval ? ` [${number(figure.low, words)}, ${number(figure.high, words)}]` : '');
}

/** The value large, its interval below it. */
export function headline(figure, words) {
  const [value, ...interval] = withInterval(figure, words).split(' ');
  return interval.length ? h('span', {}, value, ' ', h('small', {}, interval.join(' '))) : value;
}

export const count = value => isNumber(value) ? value.toLocaleString('en') : NONE;
export const epsilon = value => isNumber(value) ? String(Number(value.toPrecision(3))) : NONE;
export const plural = (n, one, several = one + 's') => `${count(n)} ${n === 1 ? one : several}`;

export function bytes(value) {
  if (!isNumber(value)) return NONE;
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${unit ? value.toPrecision(3) : value} ${units[unit]}`;
}

export function seconds(value) {
  if (!isNumber(value)) return NONE;
  if (value < 60) return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor(value % 3600 / 60)} min`;
}

export function time(value) {
  if (!isNumber(value)) return NONE;
  const date = new Date(value * 1000), two = n => String(n).padStart(2, '0');
  return `${date.getUTCFullYear()}-${two(date.getUTCMonth() + 1)}-${two(date.getUTCDate())} ${two(date.getUTCHours())}:${two(date.getUTCMinutes())} UTC`;
}

/** 1, 4–7 for 1, 4, 5, 6, 7. */
export function spans(rounds) {
  const found = [];
  for (const one of [...new Set(rounds)].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && one === last[1] + 1) last[1] = one; else found.push([one, one]);
  }
  return found.map(([a, b]) => a === b ? a : `${a}–${b}`).join(', ');
}

export const badge = status => h('span', {class: `badge ${status}`}, status === 'unknown' ? 'not known' : status);
/** Whether more may come of a run. */
export const going = run => run.status === 'running' || run.status === 'unknown';

export function facts(pairs) {
  return h('dl', {class: 'facts'}, pairs.filter(Boolean).map(([name, value, large]) =>
    h('div', {}, h('dt', {}, name), h('dd', {class: large ? 'large' : null}, value))));
}

export function table(caption, head, rows, numeric = 1) {
  const place = i => i >= numeric ? 'number' : null;
  // Not a <caption>: that is never wider than its table.
  return h('div', {class: 'told'}, h('p', {class: 'note'}, caption), h('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption},
    h('table', {'aria-label': caption},
      h('thead', {}, h('tr', {}, head.map((text, i) => h('th', {scope: 'col', class: place(i)}, text)))),
      h('tbody', {}, rows.map(row => h('tr', {}, row.map((cell, i) =>
        i ? h('td', {class: place(i)}, cell) : h('th', {scope: 'row'}, cell))))))));
}

let connected = false, away = false;
function sign(kind, text) {
  const place = document.getElementById('live');
  place.className = `live ${kind}`;
  if (place.textContent !== text) place.textContent = text;
}

/** A bar where the federation's server does not answer; the sign at the top says so, too. */
export function serverBar(server, news) {
  away = Boolean(server) && !server.running;
  if (connected) sign(away ? 'off' : 'on', away ? 'the federation’s server does not answer' : 'live');
  if (!away) return null;
  return h('p', {class: 'bad', role: 'alert', id: 'server-away'}, `No news from the federation: ${server.reason}. `
    + (server.heard === null ? 'It has not answered since this dashboard was started.' : `It last answered ${time(server.heard)}.`)
    + (news ? ` Last news of ${news[0]}: ${time(news[1])}.` : ''));
}

export function problem(error) { return h('p', {class: 'bad', role: 'alert'}, error.message); }

/** Call refresh now, whenever the server tells of news that concern the page, and after the line was lost. */
export function live(refresh, concerns) {
  let running = false, again = false;
  async function update() {
    if (running) { again = true; return; }
    running = true;
    do {
      again = false;
      try { await refresh(); } catch (error) { sign('off', error.message); }
    } while (again);
    running = false;
  }
  const source = new EventSource('/api/events');
  source.addEventListener('hello', () => { connected = true; sign('on', 'live'); update(); });
  for (const kind of ['change', 'federation']) {
    source.addEventListener(kind, event => { if (concerns(kind, JSON.parse(event.data))) update(); });
  }
  source.onerror = () => { connected = false; sign('off', 'no connection, trying again'); };
  addEventListener('pagehide', () => source.close());
  return update;
}
