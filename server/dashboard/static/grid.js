// The grid of sites and rounds: a mark for each reply, and its reason in words for mouse, keyboard and screen reader.
import {ask, count, epsilon, fill, h, seconds} from './base.js';

const MARKS = {used: '✓', lost: '✕', none: '·'};

/** Keeps the grid in `place` up to date; gives a function to call with the run's row. */
export function gridOf(place, api) {
  let window_ = null, run = null, at = [0, 0];
  const detail = h('p', {class: 'detail', role: 'status'});
  const table = h('div', {class: 'scroll', tabindex: -1}), controls = h('div', {class: 'controls'});
  place.append(legend(), controls, table, detail);

  async function update(row = run) {
    run = row;
    const found = await ask(api + '/grid' + (window_ ? `?first=${window_[0]}&last=${window_[1]}` : ''));
    const focused = table.contains(document.activeElement);
    if (!fill(table, () => build(found), found)) return;
    fill(controls, () => moves(found), [found.first, found.last, found.done]);
    if (focused) choose(...at, true);
    else if (!window_) table.scrollLeft = table.scrollWidth;
  }

  function moves({first, last, done}) {
    if (first === 1 && last >= done) return null;
    const go = (from, to) => () => { window_ = to >= done ? null : [Math.max(from, 1), to]; update(); };
    const size = last - first + 1;
    return [h('button', {type: 'button', disabled: first === 1, onclick: go(first - size, Math.max(first - 1, 1))}, 'Earlier'),
      h('span', {class: 'note'}, `Rounds ${first} to ${last} of ${count(done)}`),
      h('button', {type: 'button', disabled: last >= done, onclick: go(last + 1, Math.min(last + size, done))}, 'Later')];
  }

  function build(found) {
    if (!found.rounds.length) return h('p', {class: 'note'}, 'No round is done yet.');
    const words = (site, round) => {
      const cell = found.cells[site][round], name = `${found.sites[site]}, round ${found.rounds[round]}`;
      if (!cell) return `${name}: not asked`;
      const [reason, images, loss, spent, took] = cell;
      const more = [images && `${count(images)} images`, loss !== null && `loss ${loss.toFixed(3)}`, spent !== null && `epsilon ${epsilon(spent)}`, took !== null && seconds(took)];
      return `${name}: ${reason < 0 ? 'trained' : 'not used, ' + found.reasons[reason].words}` + more.filter(Boolean).map(text => `; ${text}`).join('');
    };
    const kind = cell => !cell ? 'none' : cell[0] < 0 ? 'used' : 'lost';
    at = [Math.min(at[0], found.sites.length - 1), Math.min(at[1], found.rounds.length - 1)];
    const rows = found.sites.map((site, i) => h('tr', {}, h('th', {scope: 'row'}, site), found.cells[i].map((cell, j) =>
      h('td', {class: kind(cell), tabindex: i === at[0] && j === at[1] ? 0 : -1, 'data-i': i, 'data-j': j, title: words(i, j), 'aria-label': words(i, j)}, MARKS[kind(cell)]))));
    const say = event => {
      const cell = event.target.closest('td');
      if (cell) detail.textContent = cell.title;
    };
    return h('table', {class: 'grid', role: 'grid', 'aria-label': 'Sites and rounds; arrow keys move', onkeydown: keys, onmouseover: say, onfocusin: say},
      h('thead', {}, h('tr', {}, h('td', {}), found.rounds.map((round, j) =>
        h('th', {scope: 'col', 'aria-label': `round ${round}`}, found.rounds.length < 25 || round % 5 === 0 || j === 0 ? String(round) : '')))),
      h('tbody', {}, rows));
  }

  function keys(event) {
    const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -1e6], End: [0, 1e6]}[event.key];
    if (!step || !event.target.dataset.i) return;
    event.preventDefault();
    const body = table.querySelectorAll('tbody tr');
    const i = Math.min(Math.max(Number(event.target.dataset.i) + step[0], 0), body.length - 1);
    choose(i, Math.min(Math.max(Number(event.target.dataset.j) + step[1], 0), body[i].children.length - 2), true);
  }

  function choose(i, j, focus) {
    table.querySelector('td[tabindex="0"]')?.setAttribute('tabindex', -1);
    const cell = table.querySelector(`td[data-i="${i}"][data-j="${j}"]`);
    if (!cell) return;
    at = [i, j];
    cell.setAttribute('tabindex', 0);
    if (focus) cell.focus();
  }

  return update;
}

function legend() {
  const sign = (kind, text) => h('span', {}, h('b', {class: kind, 'aria-hidden': 'true'}, MARKS[kind]), text);
  return h('p', {class: 'legend'}, sign('used', 'trained, reply used'), sign('lost', 'reply late, missing or refused'), sign('none', 'not asked'));
}
