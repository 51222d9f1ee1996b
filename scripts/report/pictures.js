// Pictures are taken out of the page's data when they come into view; a slider moves all of them.
(() => {
  const slider = document.getElementById('updates');
  const steps = document.getElementById('shown-steps');
  const seeds = document.getElementById('all-seeds');
  const clips = document.getElementById('clips');
  const stages = slider ? JSON.parse(slider.dataset.stages) : [];
  const figures = all('figure[data-stages]');
  const visible = new Set();

  function fill(figure) {
    const image = figure.querySelector('img');
    figure.stages ??= JSON.parse(figure.dataset.stages);
    const pinned = figure.dataset.pinned !== undefined || !slider;
    const now = pinned ? Infinity : stages[slider.value];
    const stage = figure.stages.findLast(([updates]) => updates <= now);
    const at = figure.querySelector('.at');
    if (!stage) {
      at.textContent = `none after ${now.toLocaleString('en')} updates`;
      image.removeAttribute('src');
      image.dataset.key = '';
      return;
    }
    const [updates, still, moving] = stage;
    const [key, width, height] = clips?.checked && moving ? moving : still;
    at.textContent = `${updates.toLocaleString('en')} updates`;
    if (image.dataset.key === key) return;
    image.dataset.key = key;
    const factor = image.classList.contains('tiny') ? Math.max(1, Math.round(360 / width)) : 1;
    [image.width, image.height] = [factor * width, factor * height];
    image.src = document.getElementById(`picture-${key}`).textContent;
  }
  const refresh = () => {
    if (slider) {
      const text = stages[slider.value].toLocaleString('en');
      document.querySelector('output[for=updates]').textContent = text;
      slider.setAttribute('aria-valuetext', `${text} updates`);
    }
    visible.forEach(fill);
  };
  const arrange = () => {
    all('.steps').forEach(part => {
      part.hidden = steps !== null && steps.value !== 'all' && steps.value !== part.dataset.steps;
    });
    all('figure[data-member]').forEach(figure => { figure.hidden = !seeds?.checked; });
  };

  const play = document.getElementById('play');
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play?.setAttribute('aria-pressed', 'false'); };
  play?.addEventListener('click', () => {
    if (timer) { stop(); return; }
    if (+slider.value === stages.length - 1) slider.value = 0;
    refresh();
    play.setAttribute('aria-pressed', 'true');
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      refresh();
      if (+slider.value === stages.length - 1) stop();
    }, 700);
  });
  slider?.addEventListener('input', () => { stop(); refresh(); });
  steps?.addEventListener('change', arrange);
  seeds?.addEventListener('change', arrange);
  clips?.addEventListener('change', refresh);
  const size = document.getElementById('size');
  size?.addEventListener('input', () => {
    all('.pictures').forEach(part => part.style.setProperty('--size', `${size.value}px`));
  });
  if (clips && matchMedia('(prefers-reduced-motion: reduce)').matches) clips.checked = false;
  arrange();

  const zoomed = document.getElementById('zoomed');
  for (const figure of figures) {
    figure.querySelector('.zoom').addEventListener('click', () => {
      const image = figure.querySelector('img');
      const large = zoomed.querySelector('img');
      if (!image.dataset.key) return;
      large.src = image.src;
      large.alt = image.alt;
      large.className = image.className;
      zoomed.querySelector('b').textContent = figure.querySelector('figcaption').innerText;
      zoomed.showModal();
    });
  }
  zoomed.addEventListener('click', event => { if (event.target === zoomed) zoomed.close(); });

  // The data come last in the page, so that the rest is there before them.
  addEventListener('DOMContentLoaded', () => {
    const seen = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
      visible[isIntersecting ? 'add' : 'delete'](target);
      if (isIntersecting) fill(target);
    }), {rootMargin: '300px'});
    figures.forEach(figure => seen.observe(figure));
  });
  addEventListener('beforeprint', () => figures.forEach(fill));
})();
