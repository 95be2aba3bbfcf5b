"use strict";
// Samples are shown one at a time, of one outcome or of all. Without this script all of them are shown.
for (const pager of document.querySelectorAll(".pager")) {
  const samples = [...pager.querySelectorAll(".sample")];
  const [turn, filter, previous, next, place] =
    [".turn", "select", ".previous", ".next", "output"].map((name) => pager.querySelector(name));
  let at = 0;
  const draw = () => {
    const wanted = samples.filter((sample) => !filter?.value || sample.dataset.outcome === filter.value);
    at = Math.max(0, Math.min(at, wanted.length - 1));
    for (const sample of samples) sample.hidden = sample !== wanted[at];
    place.textContent = `${wanted.length ? at + 1 : 0} of ${wanted.length}`;
    previous.disabled = at === 0;
    next.disabled = at >= wanted.length - 1;
  };
  previous.addEventListener("click", () => { at -= 1; draw(); });
  next.addEventListener("click", () => { at += 1; draw(); });
  filter?.addEventListener("change", () => { at = 0; draw(); });
  turn.hidden = false;
  draw();
}

// A link `#replay-3` leads to the section of replays and shows the fourth.
function followLink() {
  const found = /^#replay-(\d+)$/.exec(location.hash);
  if (!found) return;
  pause();
  showRow(Number(found[1]));
  document.getElementById("replay").focus({ preventScroll: true });
  document.getElementById("replay").scrollIntoView();
}
if (document.getElementById("replay")) {
  let cameFrom = null;
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.replay");
    if (!link) return;
    cameFrom = link;
    if (location.hash === link.hash) followLink();
  });
  document.getElementById("back").addEventListener("click", () => {
    const target = cameFrom ?? document.querySelector("a.replay");
    target.focus({ preventScroll: true });
    target.closest(".pager").scrollIntoView();
  });
  addEventListener("hashchange", followLink);
  followLink();
}
