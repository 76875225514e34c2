// Photos of the data set: a click on a button with data-pick searches for that one.
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick]');
  if (!button) return;
  trigger('pick', { pick: button.dataset.pick });
  window.scrollTo({ top: 0, behavior: 'smooth' });
});
