// Plotly's figures in the page's colours, light and dark, and small lines without it.
import {h} from './base.js';

export const SERIES = ['#0072B2', '#D55E00', '#009E73', '#BF5F98', '#7B68C8', '#97751B', '#5B8DB8', '#A0522D'];
const SHAPES = ['circle', 'diamond', 'square', 'triangle-up', 'x', 'triangle-down', 'star', 'hexagon'];
const dark = matchMedia('(prefers-color-scheme: dark)');
export const DASHES = ['solid', 'dash', 'dot', 'dashdot', 'longdash'];
const drawn = new Map();
let loading = null;

function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = h('script', {src: '/static/plotly.js'});
    script.onload = () => resolve(globalThis.Plotly);
    script.onerror = () => reject(new Error('The figures could not be loaded.'));
    document.head.append(script);
  });
  return loading;
}

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Draw or redraw a figure; `alt` says in words what it shows. */
export async function draw(place, traces, {x = 'round', y = '', alt = '', unit = {}, bars = false} = {}) {
  drawn.set(place, () => draw(place, traces, {x, y, alt, unit, bars}));
  const Plotly = await plotly();
  if (!place.isConnected) { drawn.delete(place); return; }
  const axis = {gridcolor: colour('--line'), linecolor: colour('--muted'), zerolinecolor: colour('--line'), automargin: true};
  const narrow = place.clientWidth < 480, last = Math.max(...traces.flatMap(trace => trace.x), 0);
  const layout = {
    font: {family: 'system-ui, sans-serif', size: narrow ? 11 : 13, color: colour('--ink')},
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', height: 340, width: place.clientWidth,
    margin: {l: 10, r: 10, t: 10, b: 10}, showlegend: traces.filter(trace => trace.name).length > 1,
    legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom'}, dragmode: narrow ? false : 'zoom',
    barmode: bars === true ? 'group' : bars || undefined, hovermode: 'closest',
    hoverlabel: {bgcolor: colour('--soft'), bordercolor: colour('--muted'), font: {color: colour('--ink')}, namelength: -1},
    xaxis: {...axis, title: {text: x}, rangemode: 'tozero', tickformat: 'd', dtick: last <= 12 ? 1 : undefined}, yaxis: {...axis, title: {text: y}, ...unit},
  };
  place.setAttribute('role', 'img');
  place.setAttribute('aria-label', alt);
  await Plotly.react(place, structuredClone(traces), layout, {displayModeBar: false, doubleClick: 'reset'});
}

/** A curve with its interval as a band; two traces. */
export function curve(points, name, i = 0, {shape = 'lines+markers', dash = 'solid'} = {}) {
  const there = points.filter(point => point.value !== null);
  const bounded = there.filter(point => point.low !== null && point.high !== null);
  const own = i === 0 && dark.matches ? '#56A8DC' : SERIES[i % SERIES.length];
  const band = {
    x: [...bounded.map(p => p.round), ...bounded.map(p => p.round).reverse()],
    y: [...bounded.map(p => p.high), ...bounded.map(p => p.low).reverse()],
    fill: 'toself', fillcolor: own + '2b', line: {width: 0}, mode: 'lines', hoverinfo: 'skip', showlegend: false,
  };
  return [band, {
    x: there.map(p => p.round), y: there.map(p => p.value), name: escaped(name), mode: shape, line: {color: own, width: 2, dash},
    marker: {color: own, size: 6, symbol: SHAPES[i % SHAPES.length]},
    customdata: there.map(p => p.low === null ? '' : ` [${p.low.toPrecision(3)}, ${p.high.toPrecision(3)}]`),
    hovertemplate: 'round %{x}: %{y:.3f}%{customdata}<extra></extra>',
  }];
}

/** Plotly takes some markup in names. */
export const escaped = name => String(name).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

const SVG = 'http://www.w3.org/2000/svg';

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** A small line of [round, value, low, high] between the bounds, with all sites' line behind it. */
export function spark(points, whole, bounds, alt) {
  const {first, last, low, high} = bounds;
  const x = round => (last > first ? (round - first) / (last - first) : .5) * 200;
  const y = value => 70 - (high > low ? (value - low) / (high - low) : .5) * 64;
  const there = points.filter(point => point[1] !== null);
  const path = found => found.map(point => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(' ');
  const picture = shape('svg', {viewBox: '0 0 200 76', preserveAspectRatio: 'none', role: 'img', 'aria-label': alt});
  const bounded = there.filter(point => point[2] !== null && point[3] !== null);
  const band = [...bounded.map(point => [point[0], point[3]]), ...bounded.map(point => [point[0], point[2]]).reverse()];
  const clip = band.map(([round, value]) => [round, Math.min(Math.max(value, low), high)]);
  if (clip.length) picture.append(shape('polygon', {points: path(clip), class: 'band'}));
  picture.append(shape('polyline', {points: path(whole), class: 'line whole'}));
  picture.append(shape('polyline', {points: path(there), class: 'line'}));
  return picture;
}

function redraw() { for (const again of [...drawn.values()]) again(); }
let waiting = 0;
addEventListener('resize', () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });
dark.addEventListener('change', redraw);
