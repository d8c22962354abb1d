// Names and focus that the theme does not set: for screen readers, and to scroll long code and wide tables with the keyboard.
addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const code of document.querySelectorAll("pre > code")) code.setAttribute("tabindex", "0");
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.setAttribute("tabindex", "0");
});
