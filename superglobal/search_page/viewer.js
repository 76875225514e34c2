// This script runs once for each gr.HTML element that uses it. The server replaces the contents of `element`, so all
// events are handled on `element` itself.
// In every element, a click on a button with data-pick searches for that image of the data set, and one on a button with
// data-shown shows more results.
// Only the viewer has `props.max_bytes` (maximum size of an upload). In it, users upload a photo and draw a box on it.
const MIN_DRAG = 8; // A shorter movement, in pixels on the screen, counts as a click.

// Selector of the element to focus when the server has updated the contents, which closes <details> and can remove the
// focused element. A failed request updates nothing, so the selector is kept only for a few seconds.
let focusNext = null;
let focusTimer;

function focusAfterUpdate(selector) {
  focusNext = selector;
  clearTimeout(focusTimer);
  focusTimer = setTimeout(() => { focusNext = null; }, 10_000);
}

new MutationObserver(() => {
  const next = focusNext && element.querySelector(focusNext);
  const focused = document.activeElement;
  if (!next || !(focused === document.body || element.contains(focused))) return;
  focusNext = null;
  next.closest('details')?.setAttribute('open', '');
  next.focus({ preventScroll: true });
}).observe(element, { subtree: true, childList: true, attributeFilter: ['open'] });

element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick], [data-shown]');
  focusNext = null;
  if (!button) return;
  if (button.dataset.shown) {
    const shown = Number(button.dataset.shown);
    focusAfterUpdate(`[data-rank="${shown + 1}"] a`);
    trigger('more', { shown });
    return;
  }
  trigger('pick', { pick: button.dataset.pick });
  window.scrollTo({ top: 0, behavior: 'smooth' });
});
if (props.max_bytes) {
  acceptUploads();
  acceptBoxes();
}

function acceptUploads() {
  async function send(file) {
    if (file.size > props.max_bytes) {
      trigger('problem', { name: file.name, bytes: file.size });
      return;
    }
    element.classList.add('sg-busy');
    try {
      const { path } = await upload(file);
      trigger('photo', { path, name: file.name });
    } catch {
      trigger('problem', { name: file.name, bytes: file.size });
    } finally {
      element.classList.remove('sg-busy');
    }
  }

  element.addEventListener('change', (event) => {
    const [file] = event.target.files ?? [];
    if (file) {
      send(file);
      event.target.value = '';
    }
  });
  element.addEventListener('dragover', (event) => {
    event.preventDefault();
    element.classList.add('sg-over');
  });
  element.addEventListener('dragleave', () => element.classList.remove('sg-over'));
  element.addEventListener('drop', (event) => {
    event.preventDefault();
    element.classList.remove('sg-over');
    const [file] = event.dataTransfer.files;
    if (file) send(file);
  });
  document.addEventListener('paste', (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (file) send(file);
  });
}

function acceptBoxes() {
  let drag = null;

  // Return the position of the pointer as (x, y), fractions of the width and height of the photo in 0..1.
  function position(photo, event) {
    const { left, top, width, height } = photo.getBoundingClientRect();
    const clamp = (value) => Math.min(1, Math.max(0, value));
    return [clamp((event.clientX - left) / width), clamp((event.clientY - top) / height)];
  }

  function corners(from, to) {
    return [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
  }

  function show(box, [x1, y1, x2, y2]) {
    const percent = { left: x1, top: y1, width: x2 - x1, height: y2 - y1 };
    for (const [key, value] of Object.entries(percent)) box.style[key] = `${100 * value}%`;
    box.hidden = false;
  }

  element.addEventListener('pointerdown', (event) => {
    const photo = event.target.closest('.sg-photo');
    if (!photo || event.button !== 0) return;
    event.preventDefault();
    photo.setPointerCapture(event.pointerId);
    const box = photo.querySelector('.sg-box');
    drag = { photo, box, from: position(photo, event), before: [box.hidden, box.style.cssText] };
  });
  element.addEventListener('pointermove', (event) => {
    if (drag) show(drag.box, corners(drag.from, position(drag.photo, event)));
  });
  element.addEventListener('pointerup', (event) => {
    if (!drag) return;
    const { photo, box, from, before } = drag;
    drag = null;
    const drawn = corners(from, position(photo, event));
    const { width, height } = photo.getBoundingClientRect();
    if ((drawn[2] - drawn[0]) * width < MIN_DRAG || (drawn[3] - drawn[1]) * height < MIN_DRAG) {
      [box.hidden, box.style.cssText] = before;
      return;
    }
    trigger('box', { box: drawn });
  });
  element.addEventListener('pointercancel', () => {
    if (drag) [drag.box.hidden, drag.box.style.cssText] = drag.before;
    drag = null;
  });
  element.addEventListener('click', (event) => {
    if (event.target.closest('[data-whole]')) trigger('whole', {});
  });

  // Return the corners of the box in the number fields, as fractions of the width and height of the photo.
  function entered(form) {
    const { left, top, width, height } = Object.fromEntries(new FormData(form));
    const [x, y] = [Number(left) / form.dataset.width, Number(top) / form.dataset.height];
    return [x, y, x + Number(width) / form.dataset.width, y + Number(height) / form.dataset.height];
  }

  element.addEventListener('input', (event) => {
    const form = event.target.closest('.sg-numbers form');
    if (form?.checkValidity()) show(element.querySelector('.sg-box'), entered(form));
  });
  element.addEventListener('submit', (event) => {
    event.preventDefault();
    focusAfterUpdate('.sg-numbers:not([open]) button'); // The update closes the form.
    trigger('box', { box: entered(event.target) });
  });
}
