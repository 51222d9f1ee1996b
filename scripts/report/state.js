// Which runs are shown, and how each of them looks everywhere on the page.
'use strict';
const DATA = JSON.parse(document.getElementById('data').textContent);
const GROUPS = DATA.groups;
const COLOURS = 8;
const LOOKS = 32;
// Of a key beside a name: circle, square, diamond, triangle, as the charts' markers are.
const SHAPES = ['circle(50%)', 'none', 'polygon(50% 0, 100% 50%, 50% 100%, 0 50%)',
  'polygon(50% 4%, 100% 92%, 0 92%)'];

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const state = {shown: new Set(GROUPS.map((_, i) => i)), looks: [], listeners: []};
const sheets = {shown: new CSSStyleSheet(), lit: new CSSStyleSheet()};
document.adoptedStyleSheets = Object.values(sheets);

const colourOf = group => `var(--c${state.looks[group] % COLOURS})`;
const markerOf = look => (look + Math.floor(look / COLOURS)) % SHAPES.length;

// A run keeps its looks while it can; where few are shown, no two have the same.
function chooseLooks() {
  const shown = [...state.shown].sort((a, b) => a - b);
  const limit = shown.length <= COLOURS ? COLOURS : LOOKS;
  const used = new Set();
  state.looks = GROUPS.map((_, group) => group % LOOKS);
  for (const group of shown) {
    let look = group % limit;
    while (shown.length <= limit && used.has(look)) look = (look + 1) % limit;
    used.add(look);
    state.looks[group] = look;
  }
}

function show(groups) {
  state.shown = new Set(groups);
  chooseLooks();
  const hidden = GROUPS.flatMap((_, i) => state.shown.has(i) ? [] : `main [data-group="${i}"]`);
  const keys = GROUPS.map((_, i) => `[data-key="${i}"]{--of:${colourOf(i)};` +
    `--as:${SHAPES[markerOf(state.looks[i])]}}`);
  const rule = hidden.length ? `${hidden.join()}{display:none!important}` : '';
  sheets.shown.replaceSync(keys.join('') + rule);
  document.getElementById('shown').textContent = state.shown.size === GROUPS.length
    ? `${GROUPS.length}` : `${state.shown.size} of ${GROUPS.length}`;
  state.listeners.forEach(listener => listener());
}

// One rule lights a run up on the whole page.
let lit = null;
function light(group) {
  if (group === lit) return;
  lit = group;
  const own = `[data-group="${group}"]`;
  sheets.lit.replaceSync(group === null ? '' :
    `svg .series:not(${own}){opacity:.13}svg ${own} .line{stroke-width:2.8;opacity:1}` +
    `tbody tr${own}>*,.panel li${own}{background:var(--lit)!important}`);
}

addEventListener('pointerover', event => {
  const near = event.target.closest?.('[data-group]');
  if (!event.target.closest?.('.plot')) light(near ? near.dataset.group : null);
});
