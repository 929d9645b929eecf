"use strict";
// What needs a script: live progress, the estimate while typing, and copying. Everything else is plain pages and forms.

const PROGRESS_PAUSE_MS = 1000;
const DRAWING_PAUSE_MS = 2000;
const TYPING_PAUSE_MS = 600;
const FRAGMENT = "text/vnd.pdtrim.fragment+html";

function say(text) {
  document.getElementById("announcer").textContent = text;
}

function makeCopyButtons(root) {
  for (const button of root.querySelectorAll("button[data-copy]")) button.hidden = !navigator.clipboard;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
  const label = button.textContent;
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => { button.textContent = label; }, 1500);
});

// Takes over the parts of a fresh copy of this page, or of some of its parts, that changed; tables that are open stay
// open, and what is ticked stays ticked. A part that somebody is at work in is left as it is.
async function refresh(address = location.href) {
  const answer = await fetch(address, { headers: { Accept: "text/html" } });
  if (answer.redirected || !answer.ok) { location.reload(); return null; }
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = fresh.querySelector(`[data-live="${part.dataset.live}"]`);
    if (!now) continue;
    makeCopyButtons(now);
    for (const box of part.querySelectorAll("input:checked")) now.querySelector(`input[value="${CSS.escape(box.value)}"]`)?.setAttribute("checked", "");
    for (const name of opened(part)) summaries(now).find((summary) => summary.textContent === name)?.parentElement.setAttribute("open", "");
    if (now.innerHTML !== part.innerHTML && !part.contains(document.activeElement)) part.replaceChildren(...now.childNodes);
  }
  document.title = fresh.title || document.title;
  return fresh.getElementById("main");
}

function summaries(part) {
  return [...part.querySelectorAll("details > summary")];
}

function opened(part) {
  return summaries(part).filter((summary) => summary.parentElement.open).map((summary) => summary.textContent);
}

function watchJob(main) {
  let waiting = null;
  const source = new EventSource(main.dataset.events);
  const later = () => {
    waiting ??= setTimeout(async () => {
      waiting = null;
      const fresh = await refresh().catch(() => null);
      if (fresh && fresh.dataset.final === "yes") { main.dataset.final = "yes"; source.close(); }
    }, PROGRESS_PAUSE_MS);
  };
  let drawing = null;
  const drawLater = () => {
    if (document.hidden) return;
    drawing ??= setTimeout(async () => {
      drawing = null;
      await refresh(main.dataset.progress).catch(() => null);
    }, DRAWING_PAUSE_MS);
  };
  const progressed = (message) => {
    drawLater();
    const event = JSON.parse(message.data);
    const step = event.stage && document.querySelector(`[data-stage="${event.stage}"]`);
    if (!step || event.data.progress === undefined) return;
    step.querySelector("progress").value = 100 * event.data.progress;
    step.querySelector(".message").textContent = event.message;
  };
  const changed = (message) => { say(JSON.parse(message.data).message); later(); };
  source.addEventListener("stage.progress", progressed);
  for (const stage of ["started", "succeeded", "failed", "requeued"]) source.addEventListener(`stage.${stage}`, changed);
  for (const state of ["pausing", "paused", "resumed", "cancelling", "cancelled", "failed", "succeeded"]) {
    source.addEventListener(`job.${state}`, changed);
  }
  source.addEventListener("error", later);
}

function watchList(seconds) {
  const again = async () => {
    const fresh = document.hidden ? document.getElementById("main") : await refresh().catch(() => null);
    if (!fresh || fresh.dataset.refresh) setTimeout(again, 1000 * seconds);
  };
  setTimeout(again, 1000 * seconds);
}

function keepEstimate(form) {
  const shown = document.getElementById("estimate");
  let waiting, asked;
  const ask = async () => {
    asked?.abort();
    asked = new AbortController();
    try {
      const answer = await fetch(form.dataset.estimate, {
        method: "POST",
        headers: { Accept: FRAGMENT },
        body: new URLSearchParams(new FormData(form)),
        signal: asked.signal,
      });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (answer.ok) shown.replaceChildren(...fresh.body.childNodes);
    } catch (error) {
      if (error.name !== "AbortError") shown.textContent = "The estimate could not be fetched; the service does not answer.";
    }
  };
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(ask, TYPING_PAUSE_MS); });
}

makeCopyButtons(document);
document.querySelector("[data-focus]")?.focus();
const main = document.getElementById("main");
if (main.dataset.events && main.dataset.final === "no") watchJob(main);
if (main.dataset.refresh) watchList(Number(main.dataset.refresh));
const form = document.querySelector("form[data-estimate]");
if (form) keepEstimate(form);
