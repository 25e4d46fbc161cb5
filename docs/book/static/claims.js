// The claims table: choose a verdict, a group, or words.
"use strict";

function filterClaims(place) {
  const rows = [...place.querySelectorAll("tbody tr")];
  const box = document.createElement("div"), count = document.createElement("output");
  box.className = "controls";
  const field = (says, input) => {
    const label = document.createElement("label"), words = document.createElement("span");
    words.textContent = says;
    label.append(words, input);
    box.append(label);
    input.addEventListener("input", show);
    return input;
  };
  const menu = (key) => {
    const select = document.createElement("select");
    select.add(new Option("all", ""));
    for (const value of [...new Set(rows.map((row) => row.dataset[key]))].sort()) select.add(new Option(value, value));
    return select;
  };
  const group = field("whose claim", menu("group")), verdict = field("verdict", menu("verdict"));
  const words = field("words", Object.assign(document.createElement("input"), { type: "search" }));
  box.append(count);
  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (group.value && row.dataset.group !== group.value) || (verdict.value && row.dataset.verdict !== verdict.value)
        || !wanted.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} claims`;
  }
  show();
  place.prepend(box);
}

const claims = document.getElementById("claims");
if (claims) filterClaims(claims);
