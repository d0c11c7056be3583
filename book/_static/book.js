// What the pages of this book do beyond the theme. No network; without scripts the pages read as they are.

// Read from disk, a browser does not let a page open other pages: search shows titles without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll(".cell_output figure > img")) offerZoom(image);
  new MutationObserver(nameScrolling).observe(document.body, { childList: true, subtree: true }); // sortable tables
  nameScrolling();
});

// A figure opens large in a dialog: by a click on it, or by the button that the keyboard reaches.
function offerZoom(image) {
  const button = document.createElement("button");
  const number = image.closest("figure").querySelector(".caption-number")?.textContent.trim() ?? "this figure";
  button.type = "button";
  button.className = "zoom";
  button.textContent = "Enlarge";
  button.setAttribute("aria-label", `Enlarge ${number}`);
  button.setAttribute("aria-haspopup", "dialog");
  button.addEventListener("click", () => enlarge(image, number));
  image.addEventListener("click", () => enlarge(image, number));
  const frame = document.createElement("div"); // the button stands in a corner of the picture
  frame.className = "framed";
  image.replaceWith(frame);
  frame.append(image, button);
}

function enlarge(image, number) {
  const dialog = document.createElement("dialog");
  const close = document.createElement("button");
  const large = image.cloneNode();
  large.removeAttribute("style");
  close.type = "button";
  close.textContent = "Close";
  dialog.className = "zoom";
  dialog.setAttribute("aria-label", number);
  dialog.append(close, large);
  dialog.addEventListener("click", () => dialog.close()); // anywhere; Esc is the browser's own
  dialog.addEventListener("close", () => dialog.remove()); // the focus goes back by itself
  document.body.append(dialog);
  dialog.showModal();
}

// What scrolls sideways can be reached by keyboard, and is called by the caption that stands under it.
function nameScrolling() {
  for (const box of document.querySelectorAll(".scroll:not([aria-labelledby]), .dt-scroll-body:not([aria-labelledby])")) {
    const caption = box.closest("figure")?.querySelector("figcaption");
    if (!caption) continue;
    caption.id ||= `${box.closest("figure").id}-caption`;
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.removeAttribute("aria-label");
    box.setAttribute("aria-labelledby", caption.id);
  }
}
