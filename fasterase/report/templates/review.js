"use strict";
const names = ["forget", "unsure", "retain"];
const rest = JSON.parse(document.getElementById("rest").textContent);
let isSaved = true;

function count() {
  for (const name of names) {
    const section = document.getElementById(name);
    const hidden = (rest[name] || []).length;
    section.querySelector("output").value = section.querySelectorAll("article").length + hidden;
  }
}

function step(article, back) {
  const all = [...document.querySelectorAll("article")];
  if (article) return all[all.indexOf(article) + (back ? -1 : 1)];
  const header = document.querySelector("header").getBoundingClientRect().bottom;
  return all.find((each) => each.getBoundingClientRect().top >= header); // the first on screen
}

function move(article, name) {
  const from = article.parentElement;
  if (from.id === name) return;
  const next = article.nextElementSibling || article.previousElementSibling;
  const target = document.getElementById(name);
  target.insertBefore(article, target.querySelector("article"));
  article.classList.toggle("moved", article.dataset.was !== name);
  isSaved = false;
  count();
  (next && next.matches("article") ? next : article).focus();
}

function quote(text) {
  return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function save() {
  const lines = ["id,decision"];
  for (const name of names) {
    const shown = document.getElementById(name).querySelectorAll("article");
    const ids = [...shown].map((article) => article.dataset.id).filter((id) => id !== undefined);
    for (const id of ids.concat(rest[name] || [])) lines.push(quote(id) + "," + name);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
  link.download = "decisions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  isSaved = true;
}

for (const article of document.querySelectorAll("article")) {
  article.dataset.was = article.parentElement.id;
  const nav = document.createElement("nav");
  for (const name of names) {
    const button = document.createElement("button");
    button.value = button.textContent = name;
    button.tabIndex = -1;
    nav.append(button);
  }
  article.append(nav);
}
document.querySelector("main").addEventListener("click", (event) => {
  const article = event.target.closest("article");
  if (event.target.matches("nav button")) move(article, event.target.value);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key;
  if (key === "s") return save();
  const article = document.activeElement.closest("article");
  const name = { f: "forget", u: "unsure", r: "retain" }[key];
  if (article && name) return move(article, name);
  const back = key === "ArrowUp" || key === "k";
  if (!back && key !== "ArrowDown" && key !== "j") return;
  const next = step(article, back);
  if (next) next.focus();
  event.preventDefault();
});
document.getElementById("save").addEventListener("click", save);
window.addEventListener("beforeunload", (event) => isSaved || event.preventDefault());
count();
