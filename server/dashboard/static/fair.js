// For whom a model is how good: the operating point, groups of patients, every model at every site.
import {count, h, number, plural, table, withInterval} from './base.js';

const FEW = 50; // validation cases below which a threshold is not firm, as in server/coverage.py
const FIGURES = {sensitivity: 'Sensitivity', specificity: 'Specificity', ppv: 'Positive predictive value', npv: 'Negative predictive value', prevalence: 'Share that has it'};

/** What the threshold does that was chosen on the validation images. */
export function showPoint(point, whose) {
  if (!point) return [];
  const line = (first, figures) => [...first, ...Object.keys(FIGURES).map(key => figures ? withInterval(figures[key]) : '–')];
  const classes = Object.entries(point.classes);
  const rows = classes.map(([name, one]) => line([name, one.threshold === null ? 'none: not both kinds of cases' : number(one.threshold)], one.test));
  const places = classes.flatMap(([name, one]) => Object.entries(one.sites ?? {}).map(([site, figures]) => line([site, name], figures)));
  const heads = Object.values(FIGURES);
  return [
    table(`At the operating point, chosen on ${plural(point.images, 'validation case')} of ${point.whose ?? 'the sites that told theirs'} (${point.words}), reported on the test cases of ${whose}.${point.images < FEW ? ` So few cases (fewer than ${FEW}) do not fix a threshold: choose it anew on more.` : ''}`, ['Class', 'Yes from', ...heads], rows),
    places.length ? h('details', {}, h('summary', {}, 'The operating point at each site'), table('The same threshold on each site’s own test cases', ['Site', 'Class', ...heads], places, 2)) : null,
  ];
}

/** Test figures by group of patients, and how far the groups of a kind lie apart. */
export function showGroups(found, words) {
  if (!found) return [];
  const rows = Object.entries(found.groups).filter(([, row]) => row.images);
  const value = row => row.metrics[words.key]?.value ?? null;
  const gaps = [...new Set(rows.map(([, row]) => row.dimension))].map(dimension => {
    const own = rows.filter(([, row]) => row.dimension === dimension && value(row) !== null).map(([, row]) => value(row));
    return own.length > 1 ? `${dimension} ${number(Math.max(...own) - Math.min(...own), words)}` : null;
  }).filter(Boolean);
  const silent = found.silent.length ? ` No figures by group from ${found.silent.join(', ')}: the rules there do not name the groups, or these are too small.` : '';
  if (!rows.length) return [h('p', {class: 'note', id: 'groups'}, 'No site tells figures by group of patients.' + silent)];
  const points = row => Object.values(row.operating_point ?? {})[0];
  return [h('div', {id: 'groups'}, table('Groups of patients on test images of the sites that tell of them; groups that are too small are left out', ['Group', words.name, 'Sensitivity', 'Specificity', 'Images', 'Sites'],
    rows.map(([, row]) => [`${row.dimension} ${row.label}`, withInterval(row.metrics[words.key], words), withInterval(points(row)?.sensitivity), withInterval(points(row)?.specificity),
      count(row.images), count(Object.keys(row.sites).length)])),
  h('p', {class: 'note'}, (gaps.length ? `Largest gap between groups: ${gaps.join('; ')}.` : '') + silent))];
}

/** Every site's own model and the federated one at every site. */
export function showMatrix(found) {
  if (!found) return [];
  const words = found.metric, sites = [...new Set(Object.values(found.models).flatMap(Object.keys))].sort();
  return [h('details', {id: 'matrix'}, h('summary', {}, 'Every model at every site'), table(`${words.name} on each site’s test images; at home a model is tested on images of where it was trained`,
    ['Trained on', ...sites.map(site => `tested at ${site}`)],
    Object.entries(found.models).map(([model, own]) => [model, ...sites.map(site => h(model === `only ${site}` ? 'strong' : 'span', {}, withInterval(own[site], words)))])))];
}
