// One run: warnings first, then the global metric, the sites, who trained when, privacy, time and bytes.
import {ask, badge, bytes, count, epsilon, facts, fill, going, h, headline, live, number, plural, seconds, serverBar, spans, table, time, withInterval} from './base.js';
import {curve, DASHES, draw, escaped, SERIES, spark} from './charts.js';
import {showGroups, showMatrix, showPoint} from './fair.js';
import {gridOf} from './grid.js';

const STEPS = {survey: 'before the first round', round: 'training', val: 'validation', test: 'test',
  personal: 'making its own model', subgroups: 'test by groups of patients'};
let metric = new URLSearchParams(location.search).get('metric') ?? '';

export const tabs = (id, here) => h('nav', {class: 'tabs', 'aria-label': 'Run'}, [['Course', `/runs/${id}`], ['Model', `/runs/${id}/model`]]
  .map(([text, href]) => h('a', {href, 'aria-current': text === here ? 'page' : null}, text)));

export async function show(main, id) {
  const api = `/api/runs/${id}`;
  const first = await ask(api);
  const part = (key, title, ...more) => {
    const place = h('div');
    return [place, h('section', {'aria-labelledby': key}, h('h2', {id: key}, title), ...more, place)];
  };
  document.title = `${first.run.name} – Consilium`;
  const bar = h('div'), head = h('div');
  const [warnings, s1] = part('warnings', 'Warnings'), [course, s2] = part('course', 'Global model by round', h('div', {id: 'metric'}));
  const [tested, s3] = part('tested', 'Test'), [sites, s4] = part('sites', 'Sites'), [grid, s5] = part('grid', 'Who trained when');
  const [privacy, s6] = part('privacy', 'Privacy'), [cost, s7] = part('cost', 'Time and bytes'), [job, s8] = part('job', 'Job');
  const title = h('h1', {}, first.run.name || first.run.path);
  main.replaceChildren(bar, title, h('p', {class: 'sub'}, first.run.path), tabs(id, 'Course'), head, s1, s2, s3, s4, s5, s6, s7, s8);
  const grids = gridOf(grid, api);
  const update = live(async () => {
    const found = await ask(api);
    metric = found.metrics.some(one => one.key === metric) ? metric : found.run.metric;
    const query = '?' + new URLSearchParams({metric});
    fill(bar, () => serverBar(found.server, going(found.run) ? ['this run', found.run.updated] : null), [found.server, found.run.updated, found.run.status]);
    fill(head, () => header(found, api, () => update()), [found.run, found.whose, found.stoppable]);
    chooser(found.metrics, () => update());
    const ready = await Promise.all([ask(api + '/warnings'), ask(api + '/course' + query), ask(api + '/sites' + query), ask(api + '/test'),
      ask(api + '/privacy'), ask(api + '/rounds'), ask(api + '/subgroups'), ask(api + '/cross-site' + query)]);
    const [told, by, local, test, spent, times, groups, matrix] = ready;
    fill(warnings, () => warningList(told, found.run), [told, found.run.status]);
    await showCourse(course, by, found);
    fill(tested, () => [...showTest(test, found), ...showPoint(test?.operating_point, found.whose.test)], [test, found.children, found.whose]);
    fill(sites, () => [...showSites(local, by, showGroups(groups, local.metric)), ...showMatrix(matrix)], [local, by.val, groups, matrix]);
    await grids(found.run);
    await showPrivacy(privacy, spent);
    await showCost(cost, times);
    fill(job, () => showJob(found), found.settings);
  }, (kind, news) => kind === 'federation' || news.runs.includes(Number(id)));
}

function header({run, metrics, whose, stoppable}, api, update) {
  const words = metrics.find(one => one.key === run.metric) ?? {name: run.metric};
  const answer = h('span', {role: 'status', class: 'note'});
  const stop = async event => {
    if (!confirm('Stop this run? What it has reached stays, and it can be resumed.')) return;
    event.target.disabled = true;
    try { answer.textContent = (await ask(api + '/stop', {method: 'POST'})).stopped ? 'It is being stopped.' : 'It was over already.'; } catch (error) { answer.textContent = error.message; }
    update();
  };
  return [
    facts([
      ['State', badge(run.status)],
      [`Test ${words.name}, ${whose.test}`, headline({value: run.test_value, low: run.test_low, high: run.test_high}, words), true],
      [`Best ${words.name}, validation`, run.best_value === null ? '–' : `${number(run.best_value, words)} at round ${run.best_round}`],
      ['Rounds', `${count(run.done)} of ${count(run.rounds)}`],
      ['Sites', count(run.sites)], ['Started', time(run.started)],
      [going(run) ? 'Last news' : 'Took', going(run) ? time(run.updated) : seconds(run.seconds)],
      ['Task and network', `${run.task}, ${run.model}`],
    ]),
    !going(run) ? null : h('progress', {max: Math.max(run.rounds, 1), value: run.done, 'aria-label': 'Rounds done'}),
    stoppable ? h('p', {}, h('button', {type: 'button', class: 'stop', onclick: stop}, 'Stop this run'), ' ', answer) : null,
  ];
}

function chooser(metrics, update) {
  fill(document.getElementById('metric'), () => h('label', {class: 'field'}, 'Metric', h('select', {onchange: event => { metric = event.target.value; update(); }},
    metrics.map(one => h('option', {value: one.key, selected: one.key === metric}, one.name)))), metrics);
}

function warningList(told, run) {
  const grave = told.filter(one => one.kind !== 'refused').map(one => h('li', {class: one.kind === 'failed' ? 'bad' : null},
    one.kind === 'failed' ? h('strong', {}, 'The run failed: ') : null, one.text));
  const lost = told.filter(one => one.kind === 'refused');
  if (!told.length) return h('p', {class: 'good'}, run.status !== 'finished' ? 'Nothing so far.' : 'Nothing to warn of: every reply of every site was used.');
  const times = steps => lost.filter(one => steps.includes(one.step)).reduce((sum, one) => sum + one.rounds.length, 0);
  return [
    grave.length ? h('ul', {class: 'warnings', id: 'warning-list'}, grave) : h('p', {class: 'note'}, 'No warning of the run.'),
    lost.length ? h('h3', {}, 'Replies not used') : null,
    lost.length ? h('p', {class: 'note', id: 'lost-count'}, `Training replies not used: ${count(times(['round']))}. Evaluations without figures: ${count(times(['val', 'test']))}.`) : null,
    lost.length ? h('ul', {class: 'warnings', id: 'lost-list'}, lost.map(one => h('li', {}, h('strong', {}, one.site), `: ${one.words}`, h('span', {class: 'quiet'},
      one.step === 'survey' ? ', before the first round' : `, ${STEPS[one.step] ?? one.step}, round ${spans(one.rounds)}`)))) : null,
  ];
}

async function showCourse(place, by, {run, whose: {val: whose}}) {
  const words = by.metric, last = by.val.at(-1);
  const chart = h('div', {class: 'chart'});
  if (!fill(place, () => !by.val.length ? h('p', {class: 'note'}, 'No validation figure yet.') : [
    chart,
    h('p', {class: 'note'}, `${words.name} on the validation images of ${whose}, with 95 % intervals. Last: ${withInterval(last, words)} at round ${last.round}`
      + (by.test.length ? `; on the test images ${withInterval(by.test.at(-1), words)} at round ${by.test.at(-1).round}.` : '.')),
    h('details', {}, h('summary', {}, 'The figures as a table'), table(words.name, ['Round', 'Value [95 % interval]', 'Images'],
      by.val.map(point => [String(point.round), withInterval(point, words), count(point.n)]))),
  ], [by, run.best_round, whose]) || !by.val.length) return;
  const traces = curve(by.val, 'validation');
  const marked = by.val.find(point => point.round === by.best_round && point.value !== null);
  if (marked) traces.push({x: [marked.round], y: [marked.value], name: 'kept', mode: 'markers', marker: {symbol: 'circle-open', size: 15, color: '#D55E00', line: {width: 3}}, hoverinfo: 'skip'});
  for (const point of by.test.slice(-1)) {
    if (point.value !== null) traces.push({x: [point.round], y: [point.value], name: 'test', mode: 'markers', marker: {symbol: 'diamond', size: 10, color: '#009E73'},
      error_y: point.low === null ? undefined : {symmetric: false, array: [point.high - point.value], arrayminus: [point.value - point.low], color: '#009E73'},
      hovertemplate: `test, round %{x}: ${withInterval(point, words)}<extra></extra>`});
  }
  await draw(chart, traces, {y: words.name, alt: `${words.name} of the global model by round; last ${withInterval(last, words)}`});
}

function showTest(test, found) {
  const chosen = found.metrics.filter(one => !one.key.includes(':'));
  const parts = [];
  if (!test) parts.push(h('p', {class: 'note'}, 'Not tested yet: the kept model is tested when the rounds are done.'));
  else {
    const rows = [[found.whose.test, test], ...Object.entries(test.sites), ...(test.server ? [['server’s own images', test.server]] : [])];
    parts.push(table(`The model of round ${test.round} on test images; 95 % intervals in brackets`, ['Images of', ...chosen.map(one => one.name), 'Images'],
      rows.map(([name, row]) => [name, ...chosen.map(one => withInterval(row.metrics[one.key], one)), count(row.images)])));
  }
  if (found.children.length) {
    const words = found.metrics.find(one => one.key === found.run.metric);
    const kinds = {pooled: 'all data in one place', local: 'one site alone', reference: 'reference network'};
    const rows = [found.run, ...found.children.filter(run => run.kind !== 'reference')];
    parts.push(table(`What it is held against: ${words.name} on the test images of ${found.whose.test}`, ['Model', 'Test [95 % interval]', 'Rounds'], rows.map(run => [
      run === found.run ? 'federated' : h('a', {href: `/runs/${run.id}`}, run.kind === 'local' ? `only ${run.path.split('/').at(-1).replace(/^local-/, '')}` : kinds[run.kind] ?? run.kind),
      withInterval({value: run.test_value, low: run.test_low, high: run.test_high}, words), count(run.done)])));
  }
  return parts;
}

function showSites(local, by, groups) {
  const words = local.metric, fair = local.fairness, names = Object.keys(local.sites);
  const parts = [];
  if (fair) {
    const on = `${fair.split === 'test' ? 'test' : 'validation'} images, round ${fair.round}`;
    const [low, high] = [fair.worst, fair.best].sort((a, b) => a.value - b.value);
    parts.push(facts([
      ['Worst site', [`${fair.worst.site} `, headline(fair.worst, words)]], ['Best site', [`${fair.best.site} `, headline(fair.best, words)]],
      ['Spread over sites', number(fair.spread, words), true], ['Measured on', on]]));
    if (low.high !== null && high.low !== null && high.low <= low.high) parts.push(h('p', {class: 'note'}, 'The intervals of the lowest and the highest site overlap: such a spread may be chance.'));
  }
  parts.push(...groups);
  const points = Object.values(local.sites).flat().filter(point => point[1] !== null);
  if (!points.length) return [...parts, h('p', {class: 'note'}, 'No site has told a validation figure yet.')];
  const values = points.map(point => point[1]).concat(by.val.map(point => point.value).filter(value => value !== null));
  const rounds = points.map(point => point[0]);
  const bounds = {first: Math.min(...rounds), last: Math.max(...rounds), low: Math.min(...values), high: Math.max(...values)};
  const whole = by.val.filter(point => point.value !== null).map(point => [point.round, point.value]);
  return [...parts, h('p', {class: 'note'}, `${words.name} on each site’s validation images; dashed: the sites together. All on the scale from ${number(bounds.low, words)} to ${number(bounds.high, words)}.`),
    h('ul', {class: 'multiples'}, names.map(name => {
      const last = local.sites[name].filter(point => point[1] !== null).at(-1);
      const text = last ? withInterval({value: last[1], low: last[2], high: last[3]}, words) : '–';
      return h('li', {}, h('header', {}, h('h3', {}, name), h('span', {class: 'nowrap'}, last ? number(last[1], words) : 'no figure')),
        spark(local.sites[name], whole, bounds, `${words.name} at ${name} by round; last ${text}`),
        h('div', {class: 'axis'}, h('span', {}, `round ${bounds.first}`), h('span', {}, String(bounds.last))));
    }))];
}

async function showPrivacy(place, spent) {
  const own = spent.spent, sites = Object.entries(spent.course), chart = h('div', {class: 'chart'});
  const promise = () => facts([
    ['Kind', {local: 'noise by each site', distributed: 'noise shared by the sites', central: 'noise by the server'}[own.kind] ?? own.kind],
    ['Epsilon spent', epsilon(own.epsilon), true], ['Allowed by the job', epsilon(spent.allowed)], ['Delta', String(own.delta)], ['For each', own.unit]]);
  const news = fill(place, () => !own.kind ? h('p', {class: 'note'}, 'This run was made without differential privacy.') : [
    promise(), sites.length ? chart : null,
    sites.length ? table('Epsilon by the last round; a site counts all its runs on these images', ['Site', 'Epsilon', 'Of allowed'], sites.map(([name, rows]) => [
      name || 'all together', epsilon(rows.at(-1)[1]), spent.allowed ? `${Math.round(100 * rows.at(-1)[1] / spent.allowed)} %` : '–'])) : null], spent);
  if (!news || !own.kind || !sites.length) return;
  await draw(chart, sites.slice(0, 12).map(([name, rows], i) => ({x: rows.map(row => row[0]), y: rows.map(row => row[1]), name: escaped(name || 'all together'), mode: 'lines',
    line: {color: SERIES[i % SERIES.length], dash: DASHES[i % DASHES.length], width: 2}})),
  {y: 'epsilon', alt: `Privacy spent by round of ${plural(sites.length, 'site')}`, unit: {rangemode: 'tozero'}});
}

async function showCost(place, times) {
  const time = h('div', {class: 'chart'}), moved = h('div', {class: 'chart'});
  const sent = times.rounds.some(row => row.down !== null);
  const down = times.rounds.reduce((sum, row) => sum + (row.down ?? 0), 0), up = times.rounds.reduce((sum, row) => sum + (row.up ?? 0), 0);
  const known = times.rounds.every(row => row.train !== null);
  const rows = Object.entries(times.sites), waits = rows.some(([, row]) => row.seconds !== null);
  const news = fill(place, () => !times.rounds.length ? h('p', {class: 'note'}, 'No round is done yet.') : [
    facts([['The run took', seconds(times.seconds)], ['Rounds took', seconds(times.rounds.reduce((sum, row) => sum + (row.seconds ?? 0), 0))],
      sent ? ['To the sites', bytes(down)] : null, sent ? ['From the sites', bytes(up)] : null]),
    h('div', {class: 'split'}, time, sent ? moved : null),
    h('p', {class: 'note'}, 'Seconds of a round, means over its sites: training as the sites tell it; transfer and queues, from the question to the reply less the training; waiting for slower sites. '
      + (known ? '' : 'Not every site tells how long it trained: then only waiting is told apart.')),
    table('Each site, over all rounds', ['Site', ...(waits ? ['From question to reply'] : []), 'Bytes to it', 'Bytes from it'],
      rows.map(([name, row]) => [name, ...(waits ? [seconds(row.seconds)] : []), bytes(row.down), bytes(row.up)])),
  ], times);
  if (!news || !times.rounds.length) return;
  const x = times.rounds.map(row => row.round);
  await draw(time, timeParts(times.rounds).map(([name, y, color, pattern]) => ({type: 'bar', x, y, name, marker: {color, pattern: {shape: pattern}},
    hovertemplate: `round %{x}: %{y:.1f} s ${name}<extra></extra>`})), {y: 'seconds', alt: 'Seconds of each round: training, transfer and queues, waiting', bars: 'stack'});
  if (!sent) return;
  await draw(moved, [['to the sites', 'down', '#0072B2'], ['from the sites', 'up', '#D55E00']].map(([name, key, color]) =>
    ({type: 'bar', x, y: times.rounds.map(row => row[key] === null ? null : row[key] / 1e6), name, marker: {color}, hovertemplate: `round %{x}: %{y:.2f} MB ${name}<extra></extra>`})),
  {y: 'MB', alt: 'Megabytes of each round', bars: true});
}

/** What a round's seconds are made of: [name, seconds by round, colour, pattern]; where the parts are not known, the whole. */
function timeParts(rounds) {
  const sum = row => row.train === null ? (row.wait === null ? row.seconds : row.seconds - row.wait) : 0;
  const parts = [['training', rounds.map(row => row.train ?? 0), '#0072B2', ''], ['transfer and queues', rounds.map(row => row.transfer ?? 0), '#E69F00', '/'],
    ['not told apart', rounds.map(row => sum(row) ?? 0), '#6B7785', 'x'], ['waiting', rounds.map(row => row.wait ?? 0), '#BF5F98', '.']];
  return parts.filter(([, y]) => y.some(value => value > 0));
}

function showJob({run, settings}) {
  const rows = Object.entries(settings);
  return [h('p', {class: 'note'}, 'SHA-256 ', h('code', {}, run.job), `, by Consilium ${run.version}`),
    rows.length ? h('details', {}, h('summary', {}, plural(rows.length, 'setting')), table('Settings', ['Setting', 'Value'], rows.map(([name, value]) => [name, String(value)]), 9)) : null];
}
