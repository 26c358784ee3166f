"use strict";
// The table of samples: filters, searches, pages. Texts of models only ever become text nodes.
(() => {
  const source = document.getElementById("samples-data");
  if (!source) return;
  const samples = JSON.parse(source.textContent);
  const PAGE = 25;
  const SIGNS = { fixed: "\u25B2", broken: "\u25BC", "still right": "\u2713", "still wrong": "\u2715", right: "\u2713", wrong: "\u2715" };
  const control = (name) => document.getElementById(`samples-${name}`);
  const body = control("body");
  let found = samples;
  let page = 0;

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Spaces stay what they are, so that a text can be copied; style shows them. Characters that nobody sees get a name.
  const PIECE = /( +)|(\t)|(\r?\n)|([\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb])/g;
  const showText = (text) => {
    const shown = element("pre", control("space").checked ? "show-space" : "");
    let end = 0;
    for (const match of text.matchAll(PIECE)) {
      shown.append(text.slice(end, match.index));
      end = match.index + match[0].length;
      const kind = ["space", "tab", "newline", "odd"][match.slice(1).findIndex((group) => group !== undefined)];
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      shown.append(element("span", kind, kind === "odd" ? `U+${code}` : match[0]));
    }
    shown.append(text.slice(end));
    if (!text) shown.append(element("span", "odd", "empty"));
    shown.tabIndex = 0;
    return shown;
  };

  const titled = (title, text, className) => {
    const block = element("div", className);
    const shown = showText(text);
    shown.setAttribute("aria-label", title);
    block.append(element("h4", "", title), shown);
    return block;
  };

  const details = (sample) => {
    const row = element("tr");
    const cell = element("td", "details");
    // A narrow screen has no room for two of the columns.
    cell.colSpan = [...document.querySelectorAll(".samples thead th")].filter((head) => head.offsetParent).length;
    const texts = element("div", "texts");
    texts.append(titled("Prompt", sample.prompt, "whole"));
    const ended = sample.stop ? `, ended by ${sample.stop}` : "";
    if (sample.before) {
      const tokens = sample.before.tokens === null ? "" : `, ${sample.before.tokens} tokens`;
      texts.append(titled(`Response before${tokens}`, sample.before.response));
    }
    const entropy = sample.entropy === null ? "" : `, entropy ${sample.entropy.toFixed(3)} nats`;
    texts.append(titled(`Response${sample.before ? " now" : ""}${entropy}${ended}`, sample.response));
    texts.append(titled("Ground truth", sample.truth, "whole"));
    cell.append(texts);
    row.append(cell);
    return row;
  };

  const toggle = (row, opener, sample) => {
    const open = opener.getAttribute("aria-expanded") !== "true";
    opener.setAttribute("aria-expanded", String(open));
    row.classList.toggle("open", open);
    if (open) row.after(details(sample));
    else row.nextSibling.remove();
  };

  const summary = (sample) => {
    const row = element("tr", "sample");
    const first = element("td");
    const opener = element("button", "opener", sample.label);
    opener.type = "button";
    opener.setAttribute("aria-expanded", "false");
    opener.setAttribute("aria-label", `Sample ${sample.label}: texts`);
    first.append(opener);
    const change = element("td", `change ${sample.change}`, `${SIGNS[sample.change]} ${sample.change}`);
    row.append(
      first,
      change,
      element("td", "failure", sample.failure === null ? "\u2013" : sample.failure.replaceAll("_", " ")),
      element("td", "number", sample.tokens === null ? "" : sample.tokens.toLocaleString("en")),
      element("td", "truth one-line", sample.truth),
      element("td", "preview one-line", sample.response.slice(0, 200)),
    );
    row.addEventListener("click", (event) => {
      if (event.target === opener || !window.getSelection().toString()) toggle(row, opener, sample);
    });
    return row;
  };

  const show = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(0, page), pages - 1);
    body.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(summary));
    const of = `${found.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples`;
    control("status").textContent = `${of}, page ${page + 1} of ${pages}`;
    control("previous").disabled = page === 0;
    control("next").disabled = page === pages - 1;
  };

  const ORDERS = {
    number: null,
    longest: (one, other) => (other.tokens ?? -1) - (one.tokens ?? -1),
    shortest: (one, other) => (one.tokens ?? Infinity) - (other.tokens ?? Infinity),
  };
  const filter = () => {
    const [change, failure] = ["change", "failure"].map((name) => control(name).value);
    const words = control("search").value.toLowerCase();
    found = samples.filter((sample) => {
      if (change && sample.change !== change) return false;
      if (failure && (sample.failure ?? "none") !== failure) return false;
      if (!words) return true;
      sample.lower ??= [sample.prompt, sample.response, sample.truth].join("\n").toLowerCase();
      return sample.lower.includes(words);
    });
    const order = ORDERS[control("order").value];
    if (order) found.sort(order);
    page = 0;
    show();
  };

  let waiting;
  control("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const name of ["change", "failure", "order"]) control(name).addEventListener("change", filter);
  control("space").addEventListener("change", () => {
    const on = control("space").checked;
    for (const text of body.querySelectorAll("pre")) text.classList.toggle("show-space", on);
  });
  const turn = (pages) => {
    page += pages;
    show();
  };
  control("previous").addEventListener("click", () => turn(-1));
  control("next").addEventListener("click", () => turn(1));
  filter();
})();
