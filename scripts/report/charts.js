// Charts are drawn when they come into view, over the runs that are shown.
(() => {
  const MARKERS = ['M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0', 'M-3.2-3.2h6.4v6.4h-6.4z',
    'M0-4.6l4.6 4.6-4.6 4.6-4.6-4.6z', 'M0-4.6l4.3 7.8h-8.6z'];
  const DASHES = ['', '7 3', '2 3', '9 3 2 3'];
  const FONT = 12;
  const escape = text => text.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);

  // 0.02, 1.5, 400, 12k, 3M
  function short(value) {
    for (const [from, size, unit] of [[1e9, 1e9, 'G'], [1e6, 1e6, 'M'], [1e4, 1e3, 'k']]) {
      if (Math.abs(value) >= from) return `${+(value / size).toPrecision(4)}${unit}`;
    }
    const text = `${+value.toPrecision(4)}`;
    return text.length > 8 ? value.toExponential(1) : text;
  }

  function roundTicks(low, high, count) {
    const rough = (high - low) / count;
    const size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find(s => s * size >= rough * .999) * size;
    const ticks = [];
    for (let i = Math.ceil(low / step); i <= high / step; i++) ticks.push(i * step);
    return ticks;
  }
  // Powers of ten, with numbers between them where there is room; low and high are exponents.
  function logTicks(low, high, count) {
    for (const digits of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
      const ticks = [];
      for (let p = Math.floor(low); p <= high; p++) {
        for (const d of digits) {
          const at = Math.log10(d) + p;
          if (at >= low && at <= high) ticks.push(d * 10 ** p);
        }
      }
      if (ticks.length >= 3) {
        return ticks.filter((_, i) => i % Math.ceil(ticks.length / (count + 1)) === 0);
      }
    }
    return roundTicks(10 ** low, 10 ** high, count);  // a short stretch is almost straight
  }

  function scale(axis, values, from, to, count) {
    const inner = axis.log ? Math.log10 : v => v;
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (axis.log && value <= 0) continue;
      low = Math.min(low, inner(value));
      high = Math.max(high, inner(value));
    }
    const room = .05 * (high - low) || (axis.log ? .15 : Math.abs(high) * .1 || 1);
    // A quantity that cannot be negative is not drawn as if it could.
    low = !axis.log && low >= 0 ? Math.max(low - room, 0) : low - room;
    high += room;
    const made = value => from + (inner(value) - low) / (high - low) * (to - from);
    const given = axis.ticks.filter(v => inner(v) >= low && inner(v) <= high);
    made.ticks = given.length ? given : (axis.log ? logTicks : roundTicks)(low, high, count);
    return made;
  }

  function draw(figure) {
    const chart = DATA.charts[figure.dataset.chart];
    const plot = figure.querySelector('.plot');
    const series = chart.series.filter(s => state.shown.has(s.group));
    if (!series.length) {
      plot.innerHTML = '<p class="note">None of the runs that are shown is in this chart.</p>';
      return;
    }
    const width = Math.max(240, plot.clientWidth);
    const large = figure.closest('.charts') !== null;
    const height = large ? 320 : 200;
    const ys = series.flatMap(s => [...s.y, ...(s.faint?.[1] ?? []),
      ...(s.errors ?? []).flatMap((e, i) => [s.y[i] - e, s.y[i] + e])]);
    const toY = scale(chart.y, ys, height - 40, 8, large ? 6 : 4);
    // Room for the longest number beside the axis.
    const longest = Math.max(...toY.ticks.map(tick => short(tick).length), 1);
    const left = Math.max(30, Math.round(longest * .6 * FONT) + 12) + 16;
    const xs = series.flatMap(s => [...s.x, ...(s.faint?.[0] ?? [])]);
    const toX = scale(chart.x, xs, left, width - 14, width / 95);
    const frame = {left, right: width - 14, top: 8, bottom: height - 40, width, height};
    const many = series.length > 12 ? ' many' : '';
    const taken = [];
    plot.innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img" ` +
      `aria-label="${escape(chart.name)}">${grid(chart, toX, toY, frame)}` +
      `<g class="all${many}">${series.map(s => line(s, toX, toY, taken)).join('')}</g></svg>`;
    figure.drawn = {series, toX, toY, chart};
  }

  function grid(chart, toX, toY, {left, right, top, bottom, height}) {
    const parts = [];
    for (const tick of toY.ticks) {
      const y = toY(tick).toFixed(1);
      parts.push(`<path class="grid" d="M${left} ${y}H${right}"/><text class="tick" x="${left - 6}"` +
        ` y="${+y + FONT * .35}" text-anchor="end">${short(tick)}</text>`);
    }
    for (const tick of toX.ticks) {
      const x = toX(tick).toFixed(1);
      parts.push(`<path class="grid" d="M${x} ${top}V${bottom}"/><text class="tick" x="${x}" ` +
        `y="${bottom + 16}" text-anchor="middle">${short(tick)}</text>`);
    }
    const middle = (top + bottom) / 2;
    parts.push(`<path class="axis" d="M${left} ${top}V${bottom}H${right}"/>`,
      `<text class="name" x="${(left + right) / 2}" y="${height - 6}" text-anchor="middle">` +
        `${escape(chart.x.title)}${chart.x.log ? ' (log)' : ''}</text>`,
      `<text class="name" transform="translate(11 ${middle}) rotate(-90)" text-anchor="middle">` +
        `${escape(clipped(chart.y.title, bottom - top))}${chart.y.log ? ' (log)' : ''}</text>`);
    return parts.join('');
  }
  const clipped = (text, room) => text.length * FONT * .52 < room - 40 ? text
    : `…${text.slice(-Math.floor((room - 40) / (FONT * .52)))}`;

  function line(s, toX, toY, taken) {
    const look = state.looks[s.group];
    const dash = DASHES[(Math.floor(look / COLOURS) + 2 * (s.variant ?? 0)) % DASHES.length];
    const path = (xs, ys) => `M${xs.map((x, i) =>
      `${toX(x).toFixed(1)} ${toY(ys[i]).toFixed(1)}`).join('L')}`;
    const parts = [];
    if (s.faint) parts.push(`<path class="raw" d="${path(...s.faint)}"/>`);
    if (s.x.length > 1) {
      const dashes = dash && ` stroke-dasharray="${dash}"`;
      parts.push(`<path class="line"${dashes} d="${path(s.x, s.y)}"/>`);
    }
    s.errors?.forEach((error, i) => {
      const ends = [s.y[i] - error, s.y[i] + error].map(toY);
      if (error && ends.every(Number.isFinite)) {
        parts.push(`<path class="bar" d="M${toX(s.x[i]).toFixed(1)} ${ends[0].toFixed(1)}` +
          `V${ends[1].toFixed(1)}"/>`);
      }
    });
    if (s.marked || s.x.length === 1) {
      s.x.forEach((x, i) => {
        const at = `translate(${toX(x).toFixed(1)} ${toY(s.y[i]).toFixed(1)})`;
        parts.push(`<path class="dot" d="${MARKERS[markerOf(look)]}" transform="${at}"/>`);
        // Numbers that would lie upon one another are left to the pointer.
        const [px, py] = [toX(x), toY(s.y[i])];
        const free = s.labels &&
          taken.every(([a, b]) => Math.abs(a - px) > 18 || Math.abs(b - py) > 12);
        if (free) {
          taken.push([px, py]);
          parts.push(`<text x="7" y="4" transform="${at}">${escape(s.labels[i])}</text>`);
        }
      });
    }
    return `<g class="series" data-group="${s.group}" style="color:${colourOf(s.group)}">` +
      `${parts.join('')}</g>`;
  }

  const tip = document.createElement('div');
  tip.id = 'tip';
  tip.hidden = true;
  document.body.append(tip);
  // Tells of the point nearest to the pointer and lights its run up.
  function point(event, figure) {
    if (!figure.drawn) return;
    const {series, toX, toY, chart} = figure.drawn;
    const box = figure.querySelector('.plot').getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let [best, near] = [Infinity, null];
    for (const s of series) {
      s.x.forEach((x, i) => {
        const distance = (toX(x) - px) ** 2 + (toY(s.y[i]) - py) ** 2;
        if (distance < best) [best, near] = [distance, [s, i]];
      });
    }
    if (best > 60 ** 2) { tip.hidden = true; light(null); return; }
    const [s, i] = near;
    const told = s.hints?.[i] ?? `${s.x[i].toLocaleString('en')}: ${+s.y[i].toPrecision(4)}`;
    tip.innerHTML = `<b>${escape(s.name)}</b><br>${escape(told)}` +
      (s.hints ? `<br>${escape(`${short(s.x[i])} ${chart.x.title}`)}` : '');
    tip.hidden = false;
    const side = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, side)}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
    light(s.group);
  }

  const visible = new Set();
  const stale = new Set(all('.chart'));
  const refresh = () => visible.forEach(figure => {
    if (stale.delete(figure)) draw(figure);
  });
  const seen = new IntersectionObserver(entries => {
    entries.forEach(entry => visible[entry.isIntersecting ? 'add' : 'delete'](entry.target));
    refresh();
  }, {rootMargin: '200px'});
  const again = () => { all('.chart').forEach(figure => stale.add(figure)); refresh(); };
  for (const figure of all('.chart')) {
    const plot = figure.querySelector('.plot');
    plot.addEventListener('pointermove', event => point(event, figure));
    plot.addEventListener('pointerdown', event => point(event, figure));
    plot.addEventListener('pointerleave', () => { tip.hidden = true; light(null); });
    seen.observe(figure);
  }
  state.listeners.push(again);
  let width = innerWidth;
  addEventListener('resize', () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  addEventListener('beforeprint', () => all('.chart').forEach(draw));
})();
