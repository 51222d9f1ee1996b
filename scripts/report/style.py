"""Looks and the little behaviour of a report. Colours are safe for colour-blind readers."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --text: #1b1f24; --soft: #5b6470;
  --rule: #d9dee4; --good: #00664a; --bad: #a63c00; --goodback: #dff3ec; --badback: #fdeadf;
  --accent: #0b62a8; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #c4619b; --c4: #b87a00;
  --c5: #2f9fdc; --c6: #6b4fa0; --c7: #5f6670; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --text: #e8eaed;
  --soft: #a2abb6; --rule: #363d46; --good: #5fd3ab; --bad: #ff9d5c; --goodback: #12362b;
  --badback: #41240f; --accent: #6db8f5; --c0: #4aa8e8; --c1: #f58231; --c2: #2cc79a;
  --c3: #e39cc6; --c4: #f0b83c; --c5: #8fd3ff; --c6: #ab91e0; --c7: #a9b1bb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.9rem, 3vw, 2rem) 4rem; max-width: 1220px;
  background: var(--page); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h4 { margin: 1rem 0 .3rem; }
small, .note, figcaption, .footnotes { color: var(--soft); font-size: .86rem; font-weight: 400; }
.lead { font-size: 1.08rem; margin: .2rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .9rem; font-size: .93rem; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .84rem; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; }
.missing { background: var(--badback); border-radius: 8px; padding: .7rem 1rem;
  margin-top: 1.2rem; font-size: .9rem; overflow-wrap: anywhere; }
.missing ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .45rem .8rem; white-space: nowrap; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; background: var(--card); }
tbody th { font-weight: 600; }
tbody tr { border-top: 1px solid var(--rule); }
tbody.teachers { background: var(--card); }
tbody.teachers + tbody { border-top: 3px double var(--soft); }
.number, .sortable thead th:nth-child(n+2) { text-align: right;
  font-variant-numeric: tabular-nums; }
td small, tbody th small { display: block; line-height: 1.25; }
td strong { color: var(--good); text-decoration: underline; text-underline-offset: 3px; }
tr.odd td.number { color: var(--soft); font-style: italic; }
.sortable thead th { cursor: pointer; }
.sortable thead th[aria-sort=ascending]::after { content: " \\2191"; }
.sortable thead th[aria-sort=descending]::after { content: " \\2193"; }
.plain td { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
.footnotes, .findings, .legend { list-style: none; padding: 0; }
.footnotes li { overflow-wrap: anywhere; }
.findings li { display: flex; gap: .7rem; align-items: baseline; padding: .22rem 0; }
.findings span:last-child { overflow-wrap: anywhere; min-width: 0; }
.verdict { flex: 0 0 4.6rem; text-align: center; font-size: .78rem; font-weight: 600;
  border-radius: 99px; padding: .05rem 0; background: var(--card); color: var(--soft); }
.verdict.better { background: var(--goodback); color: var(--good); }
.verdict.worse { background: var(--badback); color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0 .8rem;
  font-size: .88rem; }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.key { width: 28px; height: 14px; flex: none; }
figure { margin: 0; min-width: 0; }
.charts, .multiples { display: grid; gap: 1.2rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.multiples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.charts > figure { max-width: 640px; }
.multiples figcaption { overflow-wrap: anywhere; color: var(--text); }
figure > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font-family: inherit; }
svg .tick, svg .name { fill: var(--soft); }
svg .grid { stroke: var(--rule); stroke-width: .7; }
svg .axis { stroke: var(--soft); fill: none; }
svg .line { stroke: currentColor; stroke-width: 2; fill: none; stroke-linejoin: round; }
svg .raw { stroke: currentColor; stroke-width: 1; fill: none; opacity: .28; }
svg .dot { fill: currentColor; stroke: var(--page); stroke-width: 1; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); }
.s3 { color: var(--c3); } .s4 { color: var(--c4); } .s5 { color: var(--c5); }
.s6 { color: var(--c6); } .s7 { color: var(--c7); }
.pictures { display: flex; flex-wrap: wrap; gap: 1.1rem .9rem; align-items: flex-start; }
.pictures figure { max-width: 100%; }
.pictures img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.pictures img.tiny { image-rendering: pixelated; }
.pictures figcaption { margin-top: .3rem; overflow-wrap: anywhere; line-height: 1.35; }
.pictures figcaption b { color: var(--text); }
details { border: 1px solid var(--rule); border-radius: 8px; margin: .6rem 0; padding: 0 1rem; }
details[open] { padding-bottom: .9rem; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600; }
@media (max-width: 540px) { th, td { padding: .4rem .5rem; }
  .sortable tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 8.5rem; }
  .findings li { display: block; padding: .35rem 0; }
  .verdict { display: inline-block; width: 4.6rem; margin-right: .5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, tr, li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; border: 0; } }
"""

SCRIPT = """
// A click on a column's head sorts by it; teachers and students stay apart.
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  const sort = (head, column) => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    heads.forEach(h => h.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const compare = (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (x.dataset.value === undefined) {
        return (up ? 1 : -1) * x.textContent.localeCompare(y.textContent, 'en', {numeric: true});
      }
      const [p, q] = [x.dataset.value, y.dataset.value];
      if (p === '' || q === '') return (p === '') - (q === '');
      return (up ? 1 : -1) * (p - q);
    };
    for (const body of table.tBodies) body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.title = 'Sort';
    head.addEventListener('click', () => sort(head, column));
    head.addEventListener('keydown', e => { if (e.key === 'Enter') sort(head, column); });
  });
}
// Paper cannot be unfolded.
addEventListener('beforeprint', () => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
});
"""
