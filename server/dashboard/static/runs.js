// The table of runs: sort, filter, compare.
import {ask, badge, count, fill, h, headline, live, number, problem, seconds, serverBar, table, time, withInterval} from './base.js';
import {curve, draw} from './charts.js';

const COLUMNS = [
  ['Compare'], ['Run', 'name'], ['State', 'status'], ['Job', 'task'], ['Sites', 'sites'], ['Rounds', 'done'],
  ['Best, validation', 'best_value'], ['Test, 95 % interval', 'test_value'], ['Training replies not used', 'lost_training'],
  ['Evaluations without figures', 'lost_evaluations'], ['Warnings', 'warnings'], ['Started', 'started'], ['Took', 'seconds'], ['Seed', 'seed'],
];
const SIZE = 50, MOST = 8;
const asked = new URLSearchParams(location.search);
const chosen = new Set((asked.get('compare') ?? '').split(',').filter(id => /^\d{1,15}$/.test(id)).slice(0, MOST));
const state = {sort: asked.get('sort') ?? '-started', search: asked.get('search') ?? '',
  status: asked.get('status') ?? '', offset: 0, metric: asked.get('metric') ?? ''};

export async function show(main) {
  document.title = 'Runs – Consilium';
  const bar = h('div'), body = h('div'), pages = h('div', {class: 'controls'}), comparison = h('section', {'aria-labelledby': 'compared', hidden: true});
  const note = h('p', {class: 'note', role: 'status'});
  main.replaceChildren(bar, h('h1', {}, 'Runs'), filters(() => update()), note, body, pages, comparison);
  const update = live(async () => {
    const query = new URLSearchParams({limit: SIZE, ...state});
    query.delete('metric');
    for (const [name, value] of [...query]) if (value === '') query.delete(name);
    let found;
    try { found = await ask('/api/runs?' + query); } catch (error) { fill(body, () => problem(error), error.message); throw error; }
    const news = Math.max(...found.runs.map(run => run.updated));
    fill(bar, () => serverBar(found.server, found.runs.length ? ['a run', news] : null), [found.server, news]);
    const focus = document.activeElement?.dataset?.key;
    if (fill(body, () => runTable(found.runs, update), [found.runs, state, [...chosen]]) && focus) {
      body.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
    }
    note.textContent = found.total === 1 ? '1 run' : `${count(found.total)} runs`;
    fill(pages, () => paging(found.total, update), [found.total, state.offset]);
    await compare(comparison, update);
    remember();
  }, () => true);
}

function remember() {
  const query = new URLSearchParams();
  for (const name of ['sort', 'search', 'status', 'metric']) if (state[name] && state[name] !== '-started') query.set(name, state[name]);
  if (chosen.size) query.set('compare', [...chosen].join(','));
  history.replaceState(null, '', query.size ? '/?' + query : '/');
}

function filters(update) {
  let waiting = 0;
  const change = (name, value) => { state[name] = value; state.offset = 0; clearTimeout(waiting); waiting = setTimeout(update, 200); };
  const option = (value, text, now) => h('option', {value, selected: value === now}, text);
  return h('form', {class: 'controls', role: 'search', onsubmit: event => event.preventDefault()},
    h('label', {class: 'field'}, 'Name or folder contains',
      h('input', {type: 'search', maxlength: 100, value: state.search, oninput: event => change('search', event.target.value)})),
    h('label', {class: 'field'}, 'State', h('select', {onchange: event => change('status', event.target.value)},
      [['', 'any'], ['running', 'running'], ['finished', 'finished'], ['failed', 'failed'], ['stopped', 'stopped'], ['unknown', 'not known']].map(([value, text]) => option(value, text, state.status)))),
    h('label', {class: 'field narrow'}, 'Sort by', h('select', {onchange: event => change('sort', event.target.value)},
      COLUMNS.slice(1).flatMap(([text, key]) => [option('-' + key, `${text}, largest first`, state.sort), option(key, `${text}, smallest first`, state.sort)]))));
}

function runTable(rows, update) {
  if (!rows.length) return h('p', {class: 'note'}, 'No run matches. “consilium simulate” and “consilium run” write runs here.');
  const sorted = state.sort.replace('-', '');
  const head = COLUMNS.map(([text, key]) => key ? h('th', {scope: 'col', role: 'columnheader',
    'aria-sort': sorted !== key ? null : state.sort.startsWith('-') ? 'descending' : 'ascending'},
  h('button', {type: 'button', 'data-key': `sort-${key}`, onclick: () => { state.sort = state.sort === '-' + key ? key : '-' + key; state.offset = 0; update(); }}, text))
    : h('th', {scope: 'col', role: 'columnheader'}, text));
  // With roles of their own: on a narrow page rows are laid out as cards, which else are no table to a screen reader.
  return h('div', {class: 'scroll'}, h('table', {class: 'runs', role: 'table', 'aria-label': 'Runs'}, h('thead', {role: 'rowgroup'}, h('tr', {role: 'row'}, head)),
    h('tbody', {role: 'rowgroup'}, rows.map(run => row(run, update)))));
}

function row(run, update) {
  const id = String(run.id);
  const cell = (label, content) => h('td', {role: 'cell', 'data-label': label}, content);
  return h('tr', {role: 'row'},
    h('td', {role: 'cell'}, h('input', {type: 'checkbox', 'data-key': `choose-${id}`, checked: chosen.has(id), 'aria-label': `Compare ${run.name}, ${run.path}`,
      disabled: !chosen.has(id) && chosen.size >= MOST, onchange: event => { event.target.checked ? chosen.add(id) : chosen.delete(id); update(); }})),
    h('th', {scope: 'row', role: 'rowheader'}, h('a', {href: `/runs/${id}`, 'data-key': `run-${id}`}, run.name || run.path), h('span', {class: 'path'}, run.path)),
    cell('State', badge(run.status)),
    cell('Job', `${run.task}, ${run.model}`),
    cell('Sites', count(run.sites)),
    cell('Rounds', `${count(run.done)} of ${count(run.rounds)}`),
    cell('Best, validation', run.best_value === null ? '–' : h('span', {}, `${run.words.name} ${number(run.best_value, run.words)}`, h('span', {class: 'quiet'}, `, round ${run.best_round}`))),
    cell('Test', headline({value: run.test_value, low: run.test_low, high: run.test_high}, run.words)),
    cell('Training replies not used', count(run.lost_training)),
    cell('Evaluations without figures', count(run.lost_evaluations)),
    cell('Warnings', count(run.warnings)),
    cell('Started', h('span', {class: 'nowrap'}, time(run.started))),
    cell('Took', seconds(run.seconds)),
    cell('Seed', run.seed === null ? '–' : String(run.seed)));
}

function paging(total, update) {
  if (total <= SIZE) return null;
  const go = by => () => { state.offset += by; update(); };
  return [h('button', {type: 'button', disabled: state.offset === 0, onclick: go(-SIZE)}, 'Previous'),
    h('span', {class: 'note'}, `${state.offset + 1} to ${Math.min(state.offset + SIZE, total)} of ${count(total)}`),
    h('button', {type: 'button', disabled: state.offset + SIZE >= total, onclick: go(SIZE)}, 'Next')];
}

async function compare(place, update) {
  place.hidden = chosen.size < 2;
  if (place.hidden) { place.replaceChildren(); delete place.dataset.state; return; }
  const runs = await Promise.all([...chosen].map(id => ask(`/api/runs/${id}`)));
  const shared = runs[0].metrics.filter(metric => runs.every(run => run.metrics.some(other => other.key === metric.key)));
  if (!shared.length) {
    fill(place, () => [h('h2', {id: 'compared'}, 'Comparison'), h('p', {class: 'note'}, 'These runs have no metric in common.')], 'none');
    return;
  }
  const metric = shared.find(one => one.key === state.metric) ?? shared[0];
  const query = new URLSearchParams({metric: metric.key});
  const courses = await Promise.all(runs.map(run => ask(`/api/runs/${run.run.id}/course?${query}`)));
  const names = runs.map(({run}) => run.path.split('/').slice(-2).join('/') || run.name);
  const chart = h('div', {class: 'chart'});
  const news = fill(place, () => [
    h('h2', {id: 'compared'}, 'Comparison'),
    h('div', {class: 'controls'},
      h('label', {class: 'field'}, 'Metric', h('select', {'data-key': 'metric', onchange: event => { state.metric = event.target.value; update(); }},
        shared.map(one => h('option', {value: one.key, selected: one.key === metric.key}, one.name)))),
      h('button', {type: 'button', onclick: () => { chosen.clear(); update(); }}, 'Compare none')),
    chart,
    table('The sites together', ['Run', 'Best round, validation', 'Test [95 % interval]', 'Rounds', 'Sites'], runs.map(({run}, i) => [
      h('a', {href: `/runs/${run.id}`}, names[i]), withInterval(best(courses[i]), metric), withInterval(courses[i].test.at(-1), metric), count(run.done), count(run.sites)])),
  ], [courses, runs]);
  if (news) {
    await draw(chart, courses.flatMap((course, i) => curve(course.val, names[i], i)),
      {y: metric.name, alt: `${metric.name} on validation images by round, of ${names.join(', ')}`});
  }
}

const best = course => course.val.find(point => point.round === course.best_round);
