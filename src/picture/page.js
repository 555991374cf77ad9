"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const told = document.getElementById("told");
  const put = (parent, name, text, style) => {
    const element = parent.appendChild(document.createElement(name));
    if (text !== undefined) element.textContent = text;
    if (style) element.className = style;
    return element;
  };
  const tell = (text, at, token) => {
    told.hidden = false;
    told.replaceChildren();
    const line = put(told, "p", "token " + at + " ");
    put(line, "b", token.firstChild.textContent);
    line.append(": " + page.experts[text.experts[at]] + " has " + text.weights[at] + " % of the mean weight");
    const list = put(told, "ol");
    text.layers.forEach((layer, row) => {
      const item = put(list, "li", "layer " + layer);
      const visits = text.visits[at][row];
      for (let i = 0; i < visits.length; i += 2) {
        put(item, "b", page.marks[visits[i]] + " " + visits[i + 1] + " %", "e" + visits[i])
          .title = page.experts[visits[i]];
      }
    });
  };
  document.querySelectorAll(".how").forEach((how) => { how.hidden = false; });
  document.querySelectorAll(".tokens").forEach((box, number) => {
    const text = page.texts[number];
    const tokens = Array.from(box.children);
    let current = 0;
    let marked = null;
    const show = (at) => {
      if (marked) marked.classList.remove("on");
      marked = tokens[at];
      marked.classList.add("on");
      tell(text, at, marked);
    };
    const move = (at) => {
      if (at < 0 || at >= tokens.length) return;
      tokens[current].tabIndex = -1;
      current = at;
      tokens[at].tabIndex = 0;
      tokens[at].focus();
    };
    // The token whose middle is nearest in the line above or below.
    const beside = (way) => {
      const here = tokens[current].getBoundingClientRect();
      const middle = (r) => (r.left + r.right) / 2;
      let best = -1, top = null;
      for (let i = current + way; i >= 0 && i < tokens.length; i += way) {
        const r = tokens[i].getBoundingClientRect();
        if (Math.abs(r.top - here.top) < 2) continue;
        if (top === null) top = r.top;
        if (Math.abs(r.top - top) > 2) break;
        const far = (n) => Math.abs(middle(tokens[n].getBoundingClientRect()) - middle(here));
        if (best < 0 || far(i) < far(best)) best = i;
      }
      return best;
    };
    tokens.forEach((token, at) => {
      token.tabIndex = at === 0 ? 0 : -1;
      token.addEventListener("mouseenter", () => show(at));
      token.addEventListener("focus", () => show(at));
      token.addEventListener("click", () => move(at));
    });
    box.addEventListener("keydown", (event) => {
      const to = {
        ArrowRight: () => current + 1, ArrowLeft: () => current - 1,
        ArrowDown: () => beside(1), ArrowUp: () => beside(-1),
        Home: () => 0, End: () => tokens.length - 1,
      }[event.key];
      if (event.key === "Escape") told.hidden = true;
      if (!to) return;
      event.preventDefault();
      move(to());
    });
  });
})();
