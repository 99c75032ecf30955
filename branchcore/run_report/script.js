"use strict";
// Everything is readable without this: it names values under a finger, and moves through time.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const made = (name, kind, text) => {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shown = (value, share) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const tiny = size > 0 && (size < 1e-4 || size >= 1e6);
    const text = share
      ? (100 * value).toFixed(size >= 0.1 || size === 0 ? 0 : 1) + " %"
      : tiny ? value.toExponential(1).replace("+", "") : String(Number(value.toPrecision(3)));
    return text.replace(/-/g, "\u2212");
  };
  // Puts a tip beside a place of its box and keeps it inside of the box.
  const place = (tip, box, x, y) => {
    const width = box.clientWidth;
    const left = x + tip.offsetWidth + 14 > width ? x - tip.offsetWidth - 12 : x + 12;
    tip.style.transform = `translate(${Math.max(0, Math.min(left, width - tip.offsetWidth))}px, ${y}px)`;
  };
  const nearest = (xs, at) => {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - at) < Math.abs(xs[best] - at)) best = i;
    return best;
  };

  document.querySelectorAll(".charts .frame").forEach((frame, number) => {
    const chart = charts[number], plot = frame.querySelector(".plot");
    const cursor = frame.querySelector(".cursor"), tip = made("div", "tip");
    const all = [...new Set(chart.series.filter((s) => !s.level).flatMap((s) => s.x))].sort((a, b) => a - b);
    let chosen = -1;
    tip.hidden = true;
    frame.append(tip);
    const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); chosen = -1; };
    const show = (index) => {
      chosen = Math.max(0, Math.min(index, all.length - 1));
      const at = all[chosen], share = (at - chart.x[0]) / (chart.x[1] - chart.x[0]);
      cursor.setAttribute("x1", `${100 * share}%`);
      cursor.setAttribute("x2", `${100 * share}%`);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(made("b", "", `iteration ${Math.round(at)}`));
      for (const s of chart.series) {
        const i = nearest(s.x, at);
        const line = made("div"), half = s.spread[i];
        const when = s.level || s.x[i] === at ? "" : ` at ${Math.round(s.x[i])}`;
        const band = half === null || half === undefined ? "" : ` ± ${shown(half, chart.share)}`;
        line.append(made("i", `key ${s.colour}`), s.label + when, made("b", "", shown(s.y[i], chart.share) + band));
        tip.append(line);
      }
      tip.hidden = false;
      const box = plot.getBoundingClientRect(), left = box.left - frame.getBoundingClientRect().left;
      place(tip, frame, left + share * box.width, 4);
    };
    const follow = (event) => {
      const box = plot.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      show(nearest(all, chart.x[0] + share * (chart.x[1] - chart.x[0])));
    };
    frame.addEventListener("pointermove", follow);
    frame.addEventListener("pointerdown", follow);
    frame.addEventListener("pointerleave", hide);
    frame.addEventListener("blur", hide);
    frame.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      show(chosen < 0 ? all.length - 1 : chosen + step);
    });
  });

  // Titles inside of pictures become tips that a finger can ask for too.
  document.querySelectorAll(".trees figure, .bars .frame").forEach((box) => {
    const tip = made("div", "tip");
    tip.hidden = true;
    box.append(tip);
    for (const title of box.querySelectorAll("title")) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    }
    const follow = (event) => {
      const target = event.target.closest("[data-tip]");
      tip.hidden = !target;
      if (!target) return;
      tip.textContent = target.dataset.tip;
      const at = box.getBoundingClientRect();
      place(tip, box, event.clientX - at.left, Math.max(0, event.clientY - at.top - tip.offsetHeight - 12));
    };
    box.addEventListener("pointermove", follow);
    box.addEventListener("pointerdown", follow);
    box.addEventListener("pointerleave", () => { tip.hidden = true; });
  });

  const slider = document.getElementById("moment"), samples = document.querySelector(".samples");
  if (slider) {
    slider.parentNode.hidden = false;
    const times = samples.dataset.times.split(" "), now = document.querySelector("output.now");
    slider.addEventListener("input", () => {
      samples.style.setProperty("--shown", `var(--sheet${slider.value})`);
      now.textContent = `iteration ${times[slider.value]}`;
      slider.setAttribute("aria-valuetext", now.textContent);
    });
  }

  const choice = document.querySelector(".choice");
  if (choice) {
    choice.hidden = false;
    choice.addEventListener("click", (event) => {
      const asked = event.target.closest("button");
      if (!asked) return;
      for (const button of choice.querySelectorAll("button")) button.setAttribute("aria-pressed", button === asked);
      for (const figure of document.querySelectorAll(".trees figure")) figure.hidden = figure.dataset.at !== asked.dataset.at;
    });
  }
})();
