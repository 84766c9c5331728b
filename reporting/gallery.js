"use strict";
// The data: parallel arrays, one entry an image. `strips` has a picture for each source: the source, then its images.
const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images, sources = data.sources;
const number = images.text.length;
const $ = (id) => document.getElementById(id);
const CELL = 80, LINE = 96, HEAD = 24;

let threshold = data.threshold;
let blocks = [], tops = [0];

const kept = (i) => !images.lost[i] && (threshold === null || images.text[i] >= threshold);
const label = (i) => sources[images.source[i]].label;

// Where an image stands in its source's strip; place 0 is the source itself.
function paint(tile, source, place) {
  const strip = sources[source];
  tile.style.backgroundImage = `url("${strip.file}")`;
  tile.style.backgroundSize = `${strip.count * 100}% 100%`;
  tile.style.backgroundPosition = `${strip.count > 1 ? (100 * place) / (strip.count - 1) : 0}% 0`;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tileClass(i) {
  const now = kept(i);
  return `tile ${now ? "kept" : "out"}${now !== images.kept[i] ? " moved" : ""}`;
}

// ---- which images match, in which order

function matches(i, want) {
  if (want.class !== "" && label(i) !== want.class) return false;
  if (want.column !== "" && images.column[i] !== want.column) return false;
  if (want.domain !== "" && images.domain[i] !== want.domain) return false;
  if (want.reason !== "" && reason(i) !== want.reason) return false;
  if (want.low !== null && !(images.text[i] !== null && images.text[i] >= want.low)) return false;
  if (want.high !== null && !(images.text[i] !== null && images.text[i] <= want.high)) return false;
  if (want.state === "all") return true;
  const now = kept(i), moved = now !== images.kept[i];
  return { kept: now, out: !now, "now-in": now && moved, "now-out": !now && moved }[want.state];
}

// The reason at the chosen threshold; an image that is lost at any threshold keeps its own.
function reason(i) {
  return images.lost[i] || (kept(i) ? "kept" : "low text score");
}

function wanted() {
  const value = (id) => $(id).value;
  const bound = (id) => (value(id) === "" ? null : Number(value(id)));
  const index = (id) => (value(id) === "" ? "" : Number(value(id)));
  return { class: index("class"), column: index("column"), domain: index("domain"), reason: value("reason"),
    state: value("state"), low: bound("low"), high: bound("high"), sort: value("sort") };
}

function order(found, sort) {
  const last = (value) => (value === null ? Infinity : value);
  const keys = {
    near: (i) => (images.text[i] === null ? Infinity : Math.abs(images.text[i] - threshold)),
    "text-up": (i) => last(images.text[i]),
    "text-down": (i) => (images.text[i] === null ? Infinity : -images.text[i]),
    "image-up": (i) => last(images.image[i]),
    "image-down": (i) => (images.image[i] === null ? Infinity : -images.image[i]),
    column: (i) => images.column[i],
    reason: (i) => data.reasons.indexOf(reason(i)),
  };
  const key = found.map(keys[sort]);
  return found.map((_, k) => k).sort((a, b) => (key[a] === key[b] ? a - b : key[a] - key[b])).map((k) => found[k]);
}

// Blocks of the list, and the top of each: a source with its images, or a line of images in order.
function arrange() {
  const want = wanted(), found = [];
  for (let i = 0; i < number; i++) if (matches(i, want)) found.push(i);
  const words = found.length === 1 ? "image matches" : "images match";
  $("matching").textContent = `${found.length.toLocaleString("en")} ${words} the filters`;
  const perLine = Math.max(1, Math.floor($("list").clientWidth / CELL));
  blocks = [];
  if (want.sort === "class") {
    for (const i of found) {
      const block = blocks[blocks.length - 1];
      if (block && block.source === images.source[i]) block.images.push(i);
      else blocks.push({ source: images.source[i], images: [i] });
    }
    for (const block of blocks) block.height = HEAD + LINE * Math.ceil((block.images.length + 1) / perLine);
  } else {
    const sorted = order(found, want.sort);
    for (let k = 0; k < sorted.length; k += perLine) {
      blocks.push({ source: null, images: sorted.slice(k, k + perLine), height: LINE });
    }
  }
  tops = [0];
  for (const block of blocks) tops.push(tops[tops.length - 1] + block.height);
  $("list").style.height = `${tops[tops.length - 1]}px`;
  $("list").replaceChildren();
  draw();
}

// ---- the list: only the blocks on the screen, and a few beyond it, are in the page

function draw() {
  const list = $("list"), start = -list.getBoundingClientRect().top - 400, end = start + innerHeight + 800;
  let low = 0, high = blocks.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tops[middle + 1] < start) low = middle + 1;
    else high = middle;
  }
  const there = new Map([...list.children].map((row) => [Number(row.dataset.block), row]));
  for (let b = low; b < blocks.length && tops[b] < end; b++) {
    if (!there.delete(b)) list.append(drawBlock(b));
  }
  for (const row of there.values()) row.remove();
}

function drawBlock(b) {
  const block = blocks[b], row = element("div", "row");
  row.dataset.block = b;
  row.style.top = `${tops[b]}px`;
  if (block.source !== null) {
    const source = sources[block.source];
    row.append(element("h2", "", `${data.classes[source.label]} · ${source.name}`));
    row.append(drawCell(block.source, null, 0, "source"));
  }
  for (const i of block.images) {
    const score = images.text[i] === null ? "no score" : images.text[i].toFixed(3), column = data.columns[images.column[i]];
    row.append(drawCell(images.source[i], i, images.place[i], threshold === null ? column : `${column}: ${score}`));
  }
  return row;
}

function drawCell(source, i, place, text) {
  const cell = element("button", "cell"), tile = element("i", i === null ? "tile" : tileClass(i));
  paint(tile, source, place);
  cell.append(tile, text);
  cell.title = text; // long names of domains are cut
  if (i !== null) {
    cell.dataset.image = i;
    cell.onclick = () => open(i);
  }
  return cell;
}

function open(i) {
  const body = element("div"), pair = element("div", "pair"), list = element("dl");
  for (const [place, style] of [[0, "tile"], [images.place[i], tileClass(i)]]) {
    const tile = element("i", style);
    paint(tile, images.source[i], place);
    pair.append(tile);
  }
  const facts = {
    class: data.classes[label(i)], [data.column_name]: data.columns[images.column[i]],
    ...(data.domains.length ? { domain: data.domains[images.domain[i]] } : {}),
    prompt: data.prompts[images.prompt[i]], seed: images.seed[i],
    "text score": images.text[i] ?? "none", "image score": images.image[i] ?? "none",
    now: reason(i), "on the disk": images.kept[i] ? "kept" : "rejected",
    source: sources[images.source[i]].name, file: images.file[i],
  };
  for (const [name, value] of Object.entries(facts)) list.append(element("dt", "", name), element("dd", "", value));
  body.append(pair, list);
  $("detail").lastElementChild.replaceWith(body);
  $("detail").showModal();
}

// ---- the threshold: counts, command, frames

let cells = new Map();

function fillCounts() {
  const table = $("counts").querySelector("table");
  const head = element("tr");
  for (const word of ["class", ...data.columns, "all"]) head.append(element("th", "", word));
  table.append(head);
  for (const name of [...data.labels, "all"]) {
    const row = element("tr");
    row.append(element("th", "", name === "all" ? "all" : data.classes[name]));
    for (const column of [...data.columns.keys(), "all"]) {
      const cell = element("td");
      cell.dataset.key = `${name},${column}`;
      cells.set(cell.dataset.key, cell);
      row.append(cell);
    }
    table.append(row);
  }
}

function count() {
  const made = new Map(), some = new Map();
  for (let i = 0; i < number; i++) {
    const now = kept(i);
    for (const key of [`${label(i)},${images.column[i]}`, `${label(i)},all`, `all,${images.column[i]}`, "all,all"]) {
      made.set(key, (made.get(key) || 0) + 1);
      if (now) some.set(key, (some.get(key) || 0) + 1);
    }
  }
  for (const [key, cell] of cells) cell.textContent = made.has(key) ? `${some.get(key) || 0}/${made.get(key)}` : "–";
  $("total").textContent = `${(some.get("all,all") || 0).toLocaleString("en")} of ${number.toLocaleString("en")} kept`;
}

function choose() {
  threshold = Number($("threshold").value);
  apply();
}

function apply() {
  $("shown").textContent = String(threshold);
  $("command").textContent = threshold === null ? data.command : `${data.command} --threshold ${threshold}`;
  count();
  const want = wanted();
  if (want.sort === "near" || want.sort === "reason" || want.state !== "all" || want.reason !== "") arrange();
  else for (const cell of document.querySelectorAll("[data-image]")) {
    cell.firstElementChild.className = tileClass(Number(cell.dataset.image));
  }
}

// ---- start

function options(id, pairs) {
  for (const [value, text] of [["", "all"], ...pairs]) {
    const option = element("option", "", text);
    option.value = value;
    $(id).append(option);
  }
}

const slider = $("threshold"), scored = images.text.filter((value) => value !== null);
if (threshold === null) document.body.classList.add("unscored"); // nothing to slide, and no score to sort by
const start = threshold ?? 0;
slider.min = (Math.floor(scored.reduce((a, b) => Math.min(a, b), start) * 1000) / 1000).toFixed(3);
slider.max = (Math.floor(scored.reduce((a, b) => Math.max(a, b), start) * 1000) / 1000 + 0.001).toFixed(3);
slider.value = start;
$("about").textContent = data.about;
$("column-name").textContent = data.column_name;
options("class", data.labels.map((name) => [name, data.classes[name]]));
options("column", data.columns.map((name, k) => [k, name]));
options("domain", data.domains.map((name, k) => [k, name]));
$("domains").hidden = !data.domains.length;
options("reason", data.reasons.map((name) => [name, name]));
fillCounts();
apply(); // the threshold itself: the slider has steps of 0.001
arrange();
let waiting = false;
slider.oninput = () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    choose();
  });
};
for (const id of ["class", "column", "domain", "reason", "state", "low", "high", "sort"]) $(id).oninput = arrange;
addEventListener("scroll", draw, { passive: true });
addEventListener("resize", arrange);
$("command").onclick = () => navigator.clipboard?.writeText($("command").textContent);
