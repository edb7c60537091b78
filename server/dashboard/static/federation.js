// The sites as cards.
import {ask, count, epsilon, facts, fill, h, live, plural, serverBar, time} from './base.js';

export async function show(main) {
  document.title = 'Federation – Consilium';
  const title = h('h1', {}, 'Federation'), server = h('div'), cards = h('div');
  main.replaceChildren(title, server, h('h2', {}, 'Sites'), cards);
  live(async () => {
    const found = await ask('/api/federation');
    fill(server, () => about(found.server), found.server);
    fill(cards, () => siteCards(found), found);
  }, () => true);
}

function about(server) {
  if (!server) return h('p', {class: 'note'}, 'From the runs in the store. Who is connected now is shown when the dashboard is started with ', h('code', {class: 'nowrap'}, '--federation DIR'), '.');
  const online = Object.values(server.sites).filter(site => site.online).length, days = server.certificate;
  return [
    serverBar(server),
    days !== null && days < 30 ? h('p', {class: days < 0 ? 'bad' : 'warn'}, days < 0 ? 'The server’s certificate has expired.' : `The server’s certificate holds only ${plural(days, 'day')} more: consilium provision renews it.`) : null,
    facts([['Federation', server.name], ['Hospitals reach it at', server.address], ['Sites connected', server.running ? `${online} of ${Object.keys(server.sites).length}` : 'not known', true],
      ['Certificate holds', days === null ? 'cannot be read' : plural(days, 'day')]]),
  ];
}

function siteCards({sites, server}) {
  const known = new Map(sites.map(site => [site.name, site]));
  const names = [...new Set([...Object.keys(server?.sites ?? {}), ...known.keys()])].sort();
  if (!names.length) return h('p', {class: 'note'}, 'No site has taken part in a run yet.');
  return h('ul', {class: 'cards'}, names.map(name => card(name, known.get(name), server?.sites[name], server)));
}

function card(name, site, node, server) {
  const pairs = [];
  if (server?.running && node) pairs.push([node.online ? 'Connected since' : 'Last connected', node.since ? time(Date.parse(node.since) / 1000) : 'never yet']);
  if (site) {
    pairs.push(['Last run', h('a', {href: `/runs/${site.last_run}`}, time(site.surveyed))], ['Runs', count(site.runs)]);
    if (site.train !== null) pairs.push(['Images', `${count(site.train)} to train, ${count(site.val)} to validate, ${count(site.test)} to test`]);
    if (site.classes) pairs.push(['To train, by class', site.classes.map(one => `${one.name} ${one.images ? count(one.images) : 'none told'}`).join(', ')]);
    if (site.skipped) pairs.push(['Unreadable', plural(site.skipped, 'image')]);
    if (site.epsilon !== null) {
      pairs.push(['Privacy spent', h('span', {}, `epsilon ${epsilon(site.epsilon)}${site.allowed ? ` of ${epsilon(site.allowed)}` : ''}`,
        site.allowed ? h('meter', {min: 0, max: site.allowed, value: site.epsilon, 'aria-label': `Privacy spent of ${name}`}) : null)]);
    }
    pairs.push(['Training replies not used', count(site.dropped)], ['Evaluations without figures', count(site.lost_evaluations)]);
  }
  const state = !server?.running ? null : !node ? ['off', 'no longer accepted'] : node.online ? ['on', 'connected'] : ['off', 'not connected'];
  return h('li', {class: 'card'},
    h('header', {}, h('h3', {}, name), state ? h('span', {class: `badge ${state[0]}`}, state[1]) : null),
    h('dl', {}, pairs.flatMap(([term, value]) => [h('dt', {}, term), h('dd', {}, value)])),
    site?.reason ? h('p', {class: 'bad'}, `Takes no part in the last run: ${site.reason_words}`) : null,
    site?.last_reason ? h('p', {class: 'warn'}, `Last training reply not used, ${time(site.last_dropped)}: ${site.last_reason_words}`) : null,
    site ? null : h('p', {class: 'note'}, 'Has taken part in no run yet.'));
}
