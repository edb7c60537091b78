// Which page is this? Each one is a module that fills <main> and keeps itself up to date.
import {h, problem} from './base.js';

const main = document.getElementById('main');
const [, run, model] = location.pathname.match(/^\/runs\/(\d+)(\/model)?$/) ?? [];

for (const link of document.querySelectorAll('nav a')) {
  if (link.pathname === location.pathname || (run && link.pathname === '/')) {
    link.setAttribute('aria-current', link.pathname === location.pathname ? 'page' : 'true');
  }
}

try {
  if (!run && !['/', '/federation'].includes(location.pathname)) throw new Error('There is no such page: look under Runs and Federation above.');
  const page = await (model ? import('./model.js') : run ? import('./run.js')
    : location.pathname === '/federation' ? import('./federation.js') : import('./runs.js'));
  await page.show(main, run);
} catch (error) {
  main.replaceChildren(h('h1', {}, 'This page cannot be shown'), problem(error));
}
