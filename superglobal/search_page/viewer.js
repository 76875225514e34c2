// The photo that is searched for: chosen, dropped or pasted, and a box drawn into it. Runs once; `element` stays, its
// contents are the server's. `props.most` is the bytes that an upload may have.
const LEAST = 8; // px on the screen, under which a drag is a click
let drawing = null;

async function send(file) {
  if (file.size > props.most) {
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

// (x, y) in 0..1 of the photo.
function place(photo, event) {
  const { left, top, width, height } = photo.getBoundingClientRect();
  const within = (value) => Math.min(1, Math.max(0, value));
  return [within((event.clientX - left) / width), within((event.clientY - top) / height)];
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
  drawing = { photo, box, from: place(photo, event), before: [box.hidden, box.style.cssText] };
});
element.addEventListener('pointermove', (event) => {
  if (drawing) show(drawing.box, corners(drawing.from, place(drawing.photo, event)));
});
element.addEventListener('pointerup', (event) => {
  if (!drawing) return;
  const { photo, box, from, before } = drawing;
  drawing = null;
  const drawn = corners(from, place(photo, event));
  const { width, height } = photo.getBoundingClientRect();
  if ((drawn[2] - drawn[0]) * width < LEAST || (drawn[3] - drawn[1]) * height < LEAST) {
    [box.hidden, box.style.cssText] = before;
    return;
  }
  trigger('box', { box: drawn });
});
element.addEventListener('pointercancel', () => {
  if (drawing) [drawing.box.hidden, drawing.box.style.cssText] = drawing.before;
  drawing = null;
});
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-whole]')) trigger('whole', {});
});
