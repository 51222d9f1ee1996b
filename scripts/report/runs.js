// The list of runs: a filter by words, a box for each, and a choice of metric for all sections.
(() => {
  const words = document.getElementById('filter');
  const items = all('.panel li');
  const boxes = items.map(item => item.querySelector('input'));
  const metric = () => document.querySelector('.metric')?.value;

  function update() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = [];
    items.forEach((item, i) => {
      item.hidden = !wanted.every(word => GROUPS[i].search.includes(word));
      if (!item.hidden && boxes[i].checked) shown.push(i);
    });
    show(shown);
  }
  function choose(wanted) {
    boxes.forEach((box, i) => { if (!items[i].hidden) box.checked = wanted(i); });
    update();
  }
  words.addEventListener('input', update);
  boxes.forEach(box => box.addEventListener('change', update));
  document.getElementById('all').addEventListener('click', () => choose(() => true));
  document.getElementById('none').addEventListener('click', () => choose(() => false));
  document.getElementById('best')?.addEventListener('click', () => {
    const ranks = (DATA.ranks[metric()] ?? []).filter(i => !items[i].hidden);
    const kept = new Set(ranks.filter(i => !GROUPS[i].teacher).slice(0, 8));
    choose(i => kept.has(i) || GROUPS[i].teacher);
  });

  // One metric at a time, and one step count of the overview, in all sections that show them.
  for (const kind of ['metric', 'count']) {
    const pickers = all(`select.${kind}`);
    const pick = value => {
      pickers.forEach(picker => { picker.value = value; });
      all(`[data-${kind}]`).forEach(part => { part.hidden = part.dataset[kind] !== value; });
    };
    pickers.forEach(p => p.addEventListener('change', () => pick(p.value)));
    if (pickers.length) pick(pickers[0].value);
  }
  if (matchMedia('(max-width: 1079px)').matches) document.querySelector('.panel').open = false;
  update();
})();
