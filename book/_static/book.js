// What the pages of this book do beyond the theme. No network; without scripts the pages read as they are.

// Read from disk, a browser does not let a page open other pages: search shows titles without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll(".cell_output figure > img")) offerZoom(image);
  new MutationObserver(nameScrolling).observe(document.body, { childList: true, subtree: true }); // sortable tables
  nameScrolling();
  document.addEventListener("toggle", () => { // what is folded has no width before
    nameScrolling();
    dispatchEvent(new Event("resize")); // sortable tables measure their columns
  }, true);
  explainWords();
  drawCharts();
  unfold();
  addEventListener("hashchange", unfold);
});

// A link to a figure that is folded opens it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (target?.closest("details")) target.scrollIntoView();
}

// A chart that is moved (lib/show/sliders.py): what draws it is fetched from beside the page, where there is one.
function drawCharts() {
  const boxes = [...document.querySelectorAll(".chart")];
  if (!boxes.length) return;
  const script = document.createElement("script");
  script.src = `${document.documentElement.dataset.content_root ?? ""}_static/vega.js`;
  script.addEventListener("load", () => {
    for (const box of boxes) {
      const spec = JSON.parse(box.querySelector("script").textContent);
      const sheet = box.appendChild(document.createElement("div"));
      delete spec.$schema; // of the version that notebooks read
      if (box.closest(".cell").clientWidth < 640) spec.columns = 1; // a fold that is closed has no width
      vegaEmbed(sheet, spec, { mode: "vega-lite", actions: false, renderer: "svg", ast: true });
    }
  });
  document.body.append(script);
}

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
  offerFiles(image, number);
}

// Under its caption a figure has its address, its picture and its chapter's numbers, to take along.
function offerFiles(image, number) {
  const figure = image.closest("figure");
  const numbers = document.querySelector(".colophon a.download")?.getAttribute("href");
  const files = document.createElement("p");
  files.className = "files";
  for (const [text, href, download] of [["Link", `#${figure.id}`], ["SVG", image.src, `${figure.id}.svg`], ["Numbers", numbers, ""]]) {
    if (!href) continue;
    const link = document.createElement("a");
    link.textContent = text;
    link.href = href;
    link.setAttribute("aria-label", `${text} of ${number}`);
    if (download !== undefined) link.download = download;
    files.append(link, " ");
  }
  figure.append(files);
}

// A word of the glossary is explained where it stands: under the pointer, and where the keyboard's focus is.
function explainWords() {
  const definitions = JSON.parse(document.getElementById("definitions")?.textContent ?? "{}");
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  let word, later;
  const show = (link) => {
    hide();
    word = link;
    tip.textContent = definitions[decodeURI(link.hash.slice(1))];
    tip.hidden = false;
    link.setAttribute("aria-describedby", "tip");
    const box = link.getClientRects()[0];
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + tip.offsetHeight + 8 < innerHeight;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 4 : box.top - tip.offsetHeight - 4) + scrollY}px`;
  };
  const hide = () => {
    clearTimeout(later);
    word?.removeAttribute("aria-describedby");
    word = undefined;
    tip.hidden = true;
  };
  const leave = () => { later = setTimeout(hide, 200); }; // time to reach the tip itself
  for (const link of document.querySelectorAll('.bd-article a[href*="#term-"]')) {
    if (!(decodeURI(link.hash.slice(1)) in definitions)) continue;
    link.addEventListener("mouseenter", () => show(link));
    link.addEventListener("focus", () => show(link));
    link.addEventListener("mouseleave", leave);
    link.addEventListener("blur", hide);
  }
  tip.addEventListener("mouseenter", () => clearTimeout(later));
  tip.addEventListener("mouseleave", leave);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
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
  const boxes = [".scroll", ".dt-scroll-body", ".output.text_html"].map((name) => `${name}:not([aria-labelledby])`);
  for (const box of document.querySelectorAll(boxes.join())) {
    if (box.matches(".output") && box.scrollWidth <= box.clientWidth) continue;
    const caption = box.closest("figure")?.querySelector("figcaption");
    if (!caption) continue;
    caption.id ||= `${box.closest("figure").id}-caption`;
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.removeAttribute("aria-label");
    box.setAttribute("aria-labelledby", caption.id);
  }
}
