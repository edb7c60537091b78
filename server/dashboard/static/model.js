// What a run has made: best and last model with their hashes, model card, report.
import {ask, badge, bytes, facts, fill, h, headline, live, number, plural, serverBar, table, withInterval} from './base.js';
import {tabs} from './run.js';

export async function show(main, id) {
  const api = `/api/runs/${id}`;
  const first = await ask(api);
  document.title = `Model of ${first.run.name} – Consilium`;
  const bar = h('div'), head = h('div'), files = h('div'), card = h('div'), before = h('div');
  main.replaceChildren(bar, h('h1', {}, first.run.name || first.run.path), h('p', {class: 'sub'}, first.run.path), tabs(id, 'Model'), head,
    h('h2', {}, 'Models'), files, before, h('h2', {}, 'Model card'), card);
  live(async () => {
    const [found, model, previous] = await Promise.all([ask(api), ask(api + '/model'), ask(api + '/previous')]);
    const words = found.metrics.find(one => one.key === found.run.metric) ?? {name: found.run.metric}, run = found.run;
    const kept = model.kept;
    fill(bar, () => serverBar(found.server), found.server);
    fill(head, () => facts([['State', badge(run.status)],
      [`Test ${words.name}, ${found.whose.test}`, headline({value: run.test_value, low: run.test_low, high: run.test_high}, words), true],
      ['Kept', run.best_round === null ? '–' : `round ${run.best_round}, ${words.name} ${number(run.best_value, words)} on validation images`],
      ['Rule', kept ? `${kept.rule} (${plural(kept.considered.length, 'round')} looked at)` : `${words.direction < 0 ? 'smallest' : 'largest'} ${words.name} on validation images; of equals the earlier`]]), [run, kept, found.whose]);
    fill(files, () => fileList(model, api), model);
    fill(before, () => against(previous), previous);
    fill(card, () => {
      if (model.card === null) return h('p', {class: 'note'}, 'This run has no model_card.md.');
      const place = h('article', {class: 'modelcard'});
      place.innerHTML = model.card; // made by the server from Markdown, with all markup in it as text
      return place;
    }, model.card);
  }, (kind, news) => kind === 'federation' || news.runs.includes(Number(id)));
}

/** The model and the release before it on the same sites' test sums. */
function against(found) {
  if (!found) return null;
  const {release} = found, title = h('h2', {}, `Against release ${release.name} ${release.version}`);
  if (found.why_not) return [title, h('p', {class: 'note'}, `Cannot be compared: ${found.why_not}.`)];
  const told = {new: 'this model is better', old: 'this model is worse', unclear: 'no clear difference'};
  const notes = [`On the test images of ${found.sites.join(', ')}: ${found.images.new} now, ${found.images.old} then. The interval of a difference is as if of different images: wider than it need be.`,
    found.changed.length ? `Other test images than then: ${found.changed.join(', ')}.` : '',
    found.left_out.length ? `Only one of the two was tested at ${found.left_out.join(', ')}: left out.` : ''];
  return [title, table(`Both on the same sites’ test sums; the release is of ${release.released.slice(0, 10)}`, ['Metric', 'Release', 'This model', 'Difference', 'In words'],
    found.words.map(words => { const row = found.metrics[words.key]; return [words.name, ...['old', 'new', 'difference'].map(key => withInterval(row[key], words)), told[row.better]]; })),
  ...notes.filter(Boolean).map(text => h('p', {class: 'note'}, text))];
}

function fileList(model, api) {
  if (!model.here) return h('p', {class: 'note'}, 'The folder of this run is not on this machine.');
  const names = {best: 'Best', last: 'After the last round'};
  const cards = Object.entries(model.models).map(([which, file]) => h('li', {class: 'card'},
    h('header', {}, h('h3', {}, names[which]), h('span', {class: 'quiet nowrap'}, bytes(file.bytes))),
    h('dl', {}, ...Object.entries({File: file.name, 'SHA-256': h('code', {}, file.sha256), ...file.facts}).flatMap(([name, value]) => [h('dt', {}, name), h('dd', {}, value)])),
    file.damaged ? h('p', {class: 'bad'}, 'This file is not a whole safetensors file.') : null,
    h('p', {}, h('a', {class: 'button', href: `${api}/model/${which}/file`, download: true}, `Download ${file.name}`))));
  return [cards.length ? h('ul', {class: 'cards'}, cards) : h('p', {class: 'note'}, 'No model was kept yet.'),
    model.report ? h('p', {}, h('a', {href: `${api}/report/file`, download: true}, 'Download the report of this run')) : null];
}
