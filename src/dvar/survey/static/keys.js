// The keys 1, 2 and 0 press the buttons; a second press of anything sends nothing.
const form = document.querySelector("form.vote");
let sent = false;
form.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const button = form.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button) form.requestSubmit(button);
});
window.addEventListener("pageshow", () => { sent = false; });
