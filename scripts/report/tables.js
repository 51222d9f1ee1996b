// Tables sort by their heads, unfold their seeds and leave the page as CSV, Markdown and LaTeX.
(() => {
  function sort(table, head, column) {
    const first = head.dataset.better === 'higher' ? 'descending' : 'ascending';
    const other = first === 'ascending' ? 'descending' : 'ascending';
    const order = head.getAttribute('aria-sort') === first ? other : first;
    all('th[aria-sort]', table).forEach(th => th.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const text = cell => read(cell).text;
    const compare = ([a], [b]) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (x.dataset.value === undefined) {
        const [p, q] = [text(x), text(y)];
        if ((p === '–') !== (q === '–')) return p === '–' ? 1 : -1;
        return sign * p.localeCompare(q, 'en', {numeric: true});
      }
      const [p, q] = [x.dataset.value, y.dataset.value];
      if (p === '' || q === '') return (p === '') - (q === '');  // blanks come last
      return sign * (p - q);
    };
    // Teachers and students stay apart, and seeds with the row they belong to.
    for (const body of table.tBodies) {
      const families = [];
      for (const row of body.rows) {
        if (row.classList.contains('member')) families.at(-1).push(row);
        else families.push([row]);
      }
      body.append(...families.sort(compare).flat());
    }
  }

  function unfold(button) {
    const open = button.getAttribute('aria-expanded') !== 'true';
    button.setAttribute('aria-expanded', open);
    let row = button.closest('tr').nextElementSibling;
    for (; row?.classList.contains('member'); row = row.nextElementSibling) row.hidden = !open;
  }

  // What is shown, in the order in which it is shown.
  function content(table, members) {
    const rows = all('tbody tr', table).filter(row => {
      const group = row.dataset.group;
      const off = group !== undefined && group >= 0 && !state.shown.has(+group);
      return !off && (members || !row.classList.contains('member'));
    });
    const heads = all('thead th button', table).map(button => button.textContent);
    return [heads, rows.map(row => [...row.cells].map(read))];
  }
  function read(cell) {
    const copy = cell.cloneNode(true);
    all('button', copy).forEach(button => button.remove());
    const remark = all('small', copy).map(small => {
      small.remove();
      return small.textContent.trim();
    }).join(' ');
    const mark = copy.querySelector('sup');
    mark?.remove();
    const [text, spread] = copy.textContent.trim().split(' ± ');
    const {value, deviation} = cell.dataset;
    const best = Boolean(cell.querySelector('strong'));
    return {text, spread, value, deviation, remark, best, mark: mark?.textContent ?? ''};
  }
  const named = cell => cell.mark ? `${cell.text} (${cell.mark})` : cell.text;
  const quoted = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;

  const formats = {
    CSV: {end: 'csv', type: 'text/csv', make(table) {
      const [heads, rows] = content(table, true);
      const deviates = heads.map((_, i) => rows.some(row => row[i].deviation !== undefined));
      const lines = [[heads[0], 'remark', 'protocol', ...heads.slice(1).flatMap((head, i) =>
        deviates[i + 1] ? [head, `${head} ±`] : [head])]];
      for (const [name, ...cells] of rows) {
        lines.push([name.text, name.remark, name.mark, ...cells.flatMap((cell, i) => {
          const blank = cell.text === '–' ? '' : cell.text;
          const value = cell.value === undefined ? blank : cell.value.replace(/\.0$/, '');
          return deviates[i + 1] ? [value, cell.deviation ?? ''] : [value];
        })]);
      }
      return lines.map(line => `${line.map(quoted).join()}\n`).join('');
    }},
    Markdown: {end: 'md', type: 'text/markdown', make(table) {
      const [heads, rows] = content(table, false);
      const bar = text => text.replaceAll('|', '\\|');
      const shown = cell => (cell.best ? `**${cell.text}**` : bar(cell.text)) +
        (cell.spread ? ` ± ${cell.spread}` : '');
      const aligned = all('thead th', table).map(head =>
        head.classList.contains('text') ? ':--' : '--:');
      return [heads.map(bar), aligned, ...rows.map(([name, ...cells]) =>
        [bar(named(name)), ...cells.map(shown)])].map(line => `| ${line.join(' | ')} |\n`).join('');
    }},
    LaTeX: {end: 'tex', type: 'text/x-tex', make(table) {
      const [heads, rows] = content(table, false);
      const tex = text => [...text].map(c => DATA.latex[c] ?? c).join('');
      const shown = cell => (cell.best ? `\\textbf{${tex(cell.text)}}` : tex(cell.text)) +
        (cell.spread ? ` $\\pm$ ${tex(cell.spread)}` : '');
      const aligned = all('thead th', table).map(head =>
        head.classList.contains('text') ? 'l' : 'r').join('');
      return [`% ${table.dataset.title}`, `\\begin{tabular}{${aligned}}`, '\\toprule',
        `${heads.map(tex).join(' & ')} \\\\`, '\\midrule', ...rows.map(([name, ...cells]) =>
          `${[tex(named(name)), ...cells.map(shown)].join(' & ')} \\\\`),
        '\\bottomrule', '\\end{tabular}', ''].join('\n');
    }},
  };

  function save(name, type, text) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // not every browser lets a page from a file do that
      const area = document.createElement('textarea');
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
  }
  function exportBar(table) {
    const bar = document.createElement('div');
    bar.className = 'export';
    const told = document.createElement('span');
    told.setAttribute('role', 'status');
    const add = (verb, act) => {
      const label = document.createElement('span');
      label.textContent = verb;
      bar.append(label);
      for (const [name, format] of Object.entries(formats)) {
        const button = document.createElement('button');
        button.type = 'button';
        button.textContent = name;
        button.setAttribute('aria-label', `${verb} ${name}: ${table.dataset.title}`);
        button.addEventListener('click', () => act(name, format));
        bar.append(button);
      }
    };
    add('Download', (name, {end, type, make}) =>
      save(`${table.dataset.name}.${end}`, type, make(table)));
    add('Copy', async (name, {make}) => {
      await copy(make(table));
      told.textContent = `${name} copied.`;
      setTimeout(() => { told.textContent = ''; }, 3000);
    });
    bar.append(told);
    table.closest('.scroll').after(bar);
  }

  for (const table of all('table.sortable')) {
    all('thead th', table).forEach((head, column) => {
      head.querySelector('button').addEventListener('click', () => sort(table, head, column));
    });
    all('.fold', table).forEach(button => button.addEventListener('click', () => unfold(button)));
    exportBar(table);
  }
  // Paper cannot be unfolded.
  addEventListener('beforeprint', () => all('details').forEach(part => { part.open = true; }));
})();
