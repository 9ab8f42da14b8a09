/* Small repairs that the pages need in the browser; each says why. No other script is ours. */
(() => {
  "use strict";

  // The theme's FontAwesome turns <i> into <svg> and so breaks buttons of ipywidgets: nest instead.
  window.FontAwesomeConfig = { autoReplaceSvg: "nest" };

  // From file:// the search page may not fetch its text snippets; without them it works.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  }

  // ipywidgets calls the queue of MathJax 2 for every label; MathJax 3 has none. The names in our
  // controls are plain text, so there is nothing to typeset.
  let mathjax = window.MathJax;
  const withHub = (value) => {
    if (value && !value.Hub) value.Hub = { Queue() {}, Register: { StartupHook() {} } };
    return value;
  };
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => mathjax,
    set: (value) => { mathjax = withHub(value); },
  });
  withHub(mathjax);

  // Controls of ipywidgets have no accessible name, value or state of their own.
  const set = (element, name, value) => {
    if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
  };
  const text = (element) => element?.textContent.replace(/\s+/g, " ").trim() ?? "";
  function nameControls() {
    for (const box of document.querySelectorAll(".explore-controls > *")) {
      const label = text(box.querySelector(".widget-label"));
      const handle = box.querySelector('[role="slider"]');
      set(handle, "aria-label", label);
      if (handle) set(handle, "aria-valuetext", text(box.querySelector(".widget-readout")));
      // the readout shows the position; typing into it is no way to move
      if (handle) set(box.querySelector(".widget-readout"), "contenteditable", "false");
      set(box.querySelector("select"), "aria-label", label);
      const toggles = box.querySelectorAll(".widget-toggle-button");
      if (!toggles.length) continue;
      set(box, "role", "group");
      set(box, "aria-label", label);
      for (const toggle of toggles) {
        set(toggle, "aria-pressed", String(toggle.classList.contains("mod-active")));
      }
    }
  }

  // Names of the theme's own buttons: each must contain what is seen on it.
  function nameButtons() {
    for (const button of document.querySelectorAll(".search-button-field")) {
      set(button, "aria-label", text(button));
    }
    for (const button of document.querySelectorAll(".theme-switch-button")) {
      set(button, "aria-label", "Color mode: Light, Dark, System Settings");
    }
    for (const summary of document.querySelectorAll("nav details > summary")) {
      const page = text(summary.closest("li")?.querySelector("a"));
      set(summary, "aria-label", `Pages of ${page}`);
    }
  }

  // A displayed formula that is a little too wide for a phone is set smaller, to two thirds at most;
  // what is wider still scrolls in its box.
  function fitFormulas() {
    for (const formula of document.querySelectorAll("article mjx-container[display='true']")) {
      formula.dataset.size ??= parseFloat(getComputedStyle(formula).fontSize);
      formula.style.fontSize = `${formula.dataset.size}px`;
      const ratio = formula.clientWidth / formula.scrollWidth;
      if (formula.clientWidth && ratio < 1) {
        formula.style.fontSize = `${formula.dataset.size * Math.max(0.66, 0.98 * ratio)}px`;
      }
    }
  }

  // After typesetting: boxes that scroll sideways must be reachable with the keyboard.
  function reachScrollers() {
    fitFormulas();
    const boxes = "div.highlight pre, .cell_output pre, .pst-scrollable-table-container, " +
      "mjx-container[display='true'], .cell_output table.dataframe, div.math, article table";
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth + 1) set(box, "tabindex", "0");
    }
    // An inline formula wider than its line gets a box of its own, which changes its baseline, so
    // only then.
    for (const formula of document.querySelectorAll("article mjx-container:not([display])")) {
      formula.classList.remove("too-wide");
      if (formula.closest("table")) continue; // it scrolls with its table
      const line = formula.parentElement.closest("p, li, dd, dt, div").getBoundingClientRect();
      if (line.width && formula.getBoundingClientRect().right > line.right + 1) {
        formula.classList.add("too-wide");
      }
    }
    // The head of a column that is a formula alone is empty for a checker: say it in text too.
    for (const head of document.querySelectorAll("article th:has(mjx-container)")) {
      if (head.querySelector(".visually-hidden")) continue;
      const spoken = document.createElement("span");
      spoken.className = "visually-hidden";
      spoken.textContent = text(head.querySelector("math"));
      head.append(spoken);
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    nameControls();
    nameButtons();
    new MutationObserver(nameControls).observe(document.body, {
      subtree: true, childList: true, characterData: true,
      attributes: true, attributeFilter: ["class"],
    });
    reachScrollers();
    window.addEventListener("resize", reachScrollers);
    window.addEventListener("load", () => {
      (mathjax?.startup?.promise ?? Promise.resolve()).then(reachScrollers);
    });
  });
})();
