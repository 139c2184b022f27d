"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const PAGE_ROWS = 100;
  const LINE = 22; // pixels of a bar
  const UNITS = { b: 1, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40 };

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };

  /* The value of column c in row r: as it stands, or the word that its code names. */
  const at = (column, row) => (column.words ? column.words[column.codes[row]] : column.values[row]);

  /* "216,608 (9.02x)" -> 216608, "16GiB" -> 17179869184, "" -> NaN */
  const numberOf = (text) => {
    const parts = /^([-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?) ?(b|[kmgt]ib)?/i.exec(text);
    return parts ? Number(parts[1].replaceAll(",", "")) * UNITS[(parts[2] ?? "b").toLowerCase()] : NaN;
  };

  const natural = new Intl.Collator("en", { numeric: true });

  /* Rows in the order of a column; what has no number comes last, ties stay as they were. */
  const sorted = (rows, column, sign) => {
    if (column.kind !== "number") return rows.slice().sort((a, b) => sign * natural.compare(at(column, a), at(column, b)));
    const keys = new Map(rows.map((row) => [row, numberOf(String(at(column, row)))]));
    return rows.slice().sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
    });
  };

  const COMPARE = {
    "=": (a, b) => a === b, "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "!=": (a, b) => a !== b,
  };

  /* One word of a filter as a test of a row: `hugetlb` anywhere, or `vcpus>=8`, `kernel=6.5` in a column (blanks of its name as _). */
  const testOf = (word, columns) => {
    const parts = /^([^<>=!]+)(<=|>=|!=|=|<|>)(.+)$/.exec(word);
    const column = parts && columns.find((c) => c.name.replaceAll(" ", "_").toLowerCase() === parts[1]);
    if (!column) return (row) => columns.some((c) => String(at(c, row)).toLowerCase().includes(word));
    const wanted = numberOf(parts[3]);
    if (column.kind === "number" && !Number.isNaN(wanted)) return (row) => COMPARE[parts[2]](numberOf(String(at(column, row))), wanted);
    return (row) => COMPARE[parts[2]](Math.sign(natural.compare(String(at(column, row)).toLowerCase(), parts[3])), 0);
  };

  const filtered = (data, text) => {
    const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => testOf(word, data.columns));
    return Array.from({ length: data.rows }, (_, row) => row).filter((row) => tests.every((test) => test(row)));
  };

  const table = (place) => {
    const data = DATA[Number(place.dataset.place)];
    const heads = [...place.querySelectorAll("th")];
    const body = place.querySelector("tbody");
    const count = make("span", { role: "status" });
    const more = make("button", { type: "button" }, "more rows");
    const input = make("input", { type: "search", "aria-label": "filter rows", placeholder: data.columns.some((column) => column.name === "vcpus") ? "filter: hugetlb kernel=6.5 vcpus>=8" : "filter" });
    const state = { rows: filtered(data, ""), column: -1, sign: 1, shown: PAGE_ROWS };
    const numeric = data.columns.map((column) => column.kind === "number");
    heads.forEach((head, i) => numeric[i] && head.classList.add("number"));

    const draw = () => {
      const order = state.column < 0 ? state.rows : sorted(state.rows, data.columns[state.column], state.sign);
      body.replaceChildren(...order.slice(0, state.shown).map((row) => make("tr", {}, ...data.columns.map((column, i) => {
        const cell = make("td", { "data-name": column.name, ...(numeric[i] ? { class: "number" } : {}) });
        cell.textContent = at(column, row) ?? "";
        return cell;
      }))));
      const shown = Math.min(state.shown, order.length);
      count.textContent = `${shown.toLocaleString("en")} of ${order.length.toLocaleString("en")} rows` + (order.length < data.rows ? ` (${data.rows.toLocaleString("en")} without the filter)` : "");
      more.hidden = shown === order.length;
    };

    heads.forEach((head, i) => {
      const button = make("button", { type: "button", title: "sort" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        state.sign = state.column === i ? -state.sign : 1;
        state.column = i;
        heads.forEach((other, j) => (j === i ? other.setAttribute("aria-sort", state.sign > 0 ? "ascending" : "descending") : other.removeAttribute("aria-sort")));
        draw();
      });
    });
    input.addEventListener("input", () => { state.rows = filtered(data, input.value); state.shown = PAGE_ROWS; draw(); });
    more.addEventListener("click", () => { state.shown *= 10; draw(); });
    if (data.rows > 15) place.prepend(make("div", { class: "tools" }, input, count, more));
    draw();
  };

  /* No eval, no styles of its own, errors only. */
  const OPTIONS = { ast: true, actions: false, renderer: "svg", defaultStyle: false, logLevel: 1, tooltip: { disableDefaultStyle: true } };

  /* Rows of a chart as objects, of one panel. */
  const rowsOf = (data, panel) => {
    const which = data.columns.find((column) => column.name === "panel");
    const rows = Array.from({ length: data.rows }, (_, row) => row).filter((row) => at(which, row) === panel);
    return rows.map((row) => Object.fromEntries(data.columns.map((column) => [column.name, at(column, row)])));
  };

  const SVG = "http://www.w3.org/2000/svg";
  const swatch = (colour) => {
    const [svg, rect] = ["svg", "rect"].map((name) => document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries({ width: 12, height: 12, rx: 2, fill: colour })) rect.setAttribute(key, value);
    svg.setAttribute("viewBox", "0 0 12 12");
    svg.setAttribute("aria-hidden", "true");
    svg.append(rect);
    return svg;
  };

  /* What each colour stands for in these rows; the quiet ones once, as a number. */
  const legend = (list, rows) => {
    const named = new Map();
    const quiet = new Set();
    for (const row of rows) {
      const word = row.legend ?? row.label;
      if (row.legend === undefined && row.mark === "") quiet.add(row.label);
      else named.set(word, [row.colour, row.mark]);
    }
    const entries = [...named].sort((a, b) => natural.compare(a[1][1] ?? "", b[1][1] ?? ""));
    const items = entries.map(([word, [colour, mark]]) => make("li", {}, swatch(colour), (mark ? `${mark}  ` : "") + word));
    if (quiet.size) items.push(make("li", {}, swatch("#8b8f98"), `${quiet.size} more, without a letter`));
    list.replaceChildren(...items);
  };

  /* The rows of a drawing as a table, for those who do not see it. */
  const asTable = (place, data, rows) => {
    const hidden = new Set(["panel", "colour", "rank", "last"]);
    const names = data.columns.map((column) => column.name).filter((name) => !hidden.has(name));
    const cells = (kind, values) => make("tr", {}, ...values.map((value) => make(kind, kind === "th" ? { scope: "col" } : {}, String(value ?? ""))));
    const drawn = make("table", {}, make("thead", {}, cells("th", names)), make("tbody", {}, ...rows.map((row) => cells("td", names.map((name) => row[name])))));
    place.replaceChildren(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "data of this chart" }, drawn));
  };

  const chart = (figure) => {
    const data = DATA[Number(figure.dataset.place)];
    const drawing = figure.querySelector(".drawing");
    const which = data.columns.find((column) => column.name === "panel");
    const panels = [...new Set(Array.from({ length: data.rows }, (_, row) => at(which, row)))];
    const details = make("details", {}, make("summary", { class: "note" }, "the same as a table"), make("div"));
    let drawn = null;
    let current = panels[0];
    let view = data.views[0][1];

    const draw = async () => {
      const rows = rowsOf(data, current);
      legend(figure.querySelector(".legend"), rows);
      if (details.open) asTable(details.lastChild, data, rows);
      if (drawn) drawn.finalize();
      const title = figure.dataset.title;
      const height = view.height ?? LINE * new Set(rows.map((row) => row.label)).size;
      const spec = { ...view, height, description: panels.length > 1 ? `${title}: ${current}` : title, datasets: { rows } };
      drawn = await window.vegaEmbed(drawing, spec, OPTIONS);
      figure.dataset.drawn = "yes";
    };

    details.addEventListener("toggle", () => details.open && asTable(details.lastChild, data, rowsOf(data, current)));
    figure.append(details);
    const choices = make("div", { class: "tools" });
    const choose = (label, names, act) => {
      if (names.length < 2) return;
      const select = make("select", {}, ...names.map((name, i) => make("option", { value: i }, name)));
      select.addEventListener("change", () => { act(Number(select.value)); draw(); });
      choices.append(make("label", {}, label, select));
    };
    choose("for", panels, (i) => { current = panels[i]; });
    choose("as", data.views.map(([name]) => name), (i) => { view = data.views[i][1]; });
    figure.insertBefore(choices, drawing);
    return draw();
  };

  document.querySelectorAll(".table[data-place]").forEach(table);
  /* Charts are drawn when they come near the window: a page of twelve opens as fast as one of two. */
  const near = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    near.unobserve(entry.target);
    chart(entry.target);
  }), { rootMargin: "600px" });
  document.querySelectorAll("figure.chart").forEach((figure) => near.observe(figure));
})();
