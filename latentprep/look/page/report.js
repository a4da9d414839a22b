"use strict";
// Filters and sorts the gallery. What is asked for stands in the address (#bucket=512x512&sort=loss), or a sample (#s12).
const form = document.querySelector(".filters"), list = document.getElementById("cards");
const fields = [...form.elements].filter((field) => field.name), tags = new Set();
for (const option of document.querySelectorAll("#tags option")) tags.add(option.value.toLowerCase());
const cards = [...list.children].map((item, place) => ({
  item, place, key: item.dataset.key, bucket: item.dataset.bucket, set: item.dataset.set,
  loss: -item.dataset.loss, weight: +item.dataset.weight, score: -(item.dataset.score || -1),
  captions: [...item.querySelectorAll(".caption")].map((caption) => caption.textContent.toLowerCase()),
}));

let order = "place";

function has(card, tag) {
  if (!tags.has(tag)) return card.captions.some((caption) => caption.includes(tag));
  return card.captions.some((caption) => caption.split(",").some((part) => part.trim() === tag));
}

function apply() {
  const asked = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  const key = asked.key.toLowerCase(), tag = asked.tag.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    const fits = card.key.toLowerCase().includes(key) && (!tag || has(card, tag)) &&
      (!asked.bucket || card.bucket === asked.bucket) && (!asked.set || card.set === asked.set);
    card.item.hidden = !fits;
    count += fits;
  }
  const by = asked.sort || "place";
  if (by !== order) {  // what is moved loses the focus
    cards.sort((one, other) => (one[by] < other[by] ? -1 : one[by] > other[by] ? 1 : one.place - other.place));
    list.append(...cards.map((card) => card.item));
    order = by;
  }
  const all = cards.length.toLocaleString("en");
  document.querySelector(".status").textContent =
    count === cards.length ? `${all} images` : `${count.toLocaleString("en")} of ${all} images`;
}

function follow() {
  const hash = location.hash.slice(1), sample = /^s\d+$/.test(hash) && document.getElementById(hash);
  if (sample) {
    if (sample.hidden) {
      for (const field of fields) field.value = "";
      apply();
    }
    sample.firstElementChild.open = true;
    sample.scrollIntoView();
    sample.querySelector("summary").focus({ preventScroll: true });
  } else if (hash.includes("=")) {
    const asked = new URLSearchParams(hash.replaceAll("+", "%2B"));
    for (const field of fields) field.value = asked.get(field.name) || "";
    apply();
    document.getElementById("gallery").scrollIntoView();
  }
}

function remember() {
  const asked = fields.filter((field) => field.value);
  const hash = asked.map((field) => `${field.name}=${encodeURIComponent(field.value)}`).join("&");
  history.replaceState(null, "", `#${hash || "gallery"}`);
  apply();
}

form.addEventListener("input", remember);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(remember));
list.addEventListener("keydown", (event) => {
  const open = event.key === "Escape" && event.target.closest("details[open]");
  if (open) { open.open = false; open.firstElementChild.focus(); }
});
addEventListener("hashchange", follow);
addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link && link.hash === location.hash) follow();  // the address stays as it is
});
follow();
