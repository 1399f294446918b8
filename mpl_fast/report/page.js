"use strict";
// The map of features: the point nearest to the pointer, or chosen by arrow keys, with its image.
(() => {
  const data = document.getElementById("points");
  if (!data) return;
  const map = JSON.parse(data.textContent);
  const box = document.getElementById("map"), svg = box.querySelector("svg");
  const tip = document.getElementById("tip"), ring = document.getElementById("ring");
  const [picture, ...lines] = tip.children;
  const order = map.points.map((_, i) => i).sort((a, b) => map.points[a][0] - map.points[b][0]);
  const [, , width, height] = svg.getAttribute("viewBox").split(/\s+/).map(Number);
  const side = 130, rows = Math.ceil(map.points.length / map.across);
  let at = -1;
  svg.setAttribute("tabindex", "0");
  picture.style.backgroundSize = `${map.across * side}px ${rows * side}px`;

  function show(place) {
    const [x, y, truth, guess, percent, unlabeled] = map.points[place];
    const area = svg.getBoundingClientRect(), outer = box.getBoundingClientRect();
    const left = area.left + x * area.width / width, top = area.top + y * area.height / height;
    picture.style.backgroundPosition =
      `-${place % map.across * side}px -${Math.floor(place / map.across) * side}px`;
    lines[0].textContent = unlabeled ? "unlabeled image" : truth === guess ? "right" : "wrong";
    lines[1].textContent = truth < 0 ? "true class: unknown" : `true class: ${map.names[truth]}`;
    lines[2].textContent = `predicted: ${map.names[guess]}, ${percent}\u00a0%`;
    tip.hidden = ring.hidden = false;
    ring.style.left = `${left - outer.left + box.scrollLeft}px`;
    ring.style.top = `${top - outer.top}px`;
    const right = left + 14 + tip.offsetWidth < innerWidth;
    tip.style.left = `${Math.max(4, right ? left + 14 : left - 14 - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(4, Math.min(top - 40, innerHeight - tip.offsetHeight - 4))}px`;
    at = place;
  }
  function hide() { tip.hidden = ring.hidden = true; at = -1; }
  function nearest(event) {
    const area = svg.getBoundingClientRect();
    const x = (event.clientX - area.left) * width / area.width;
    const y = (event.clientY - area.top) * height / area.height;
    let best = -1, least = 14 ** 2;
    map.points.forEach(([a, b], i) => {
      const far = (a - x) ** 2 + (b - y) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    if (best < 0) hide(); else show(best);
  }
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  addEventListener("scroll", hide, { passive: true, capture: true });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const many = order.length, place = at < 0 ? 0 : order.indexOf(at) + step;
    show(order[((place % many) + many) % many]);
  });
})();
