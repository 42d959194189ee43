// Filters and sorting for the scoreboard. The table is complete without them.
document.addEventListener("DOMContentLoaded", () => {
  const board = document.querySelector(".rp-scoreboard");
  if (!board) return;
  const form = board.querySelector(".rp-filters");
  const table = board.querySelector(".rp-table");
  const shown = board.querySelector(".rp-shown");
  const heads = [...table.querySelectorAll("thead th")];

  const papers = [...table.tBodies].map((body) => {
    const [first, ...claims] = body.rows;
    return {
      body,
      data: body.dataset,
      text: `${first.textContent} ${body.dataset.chapter}`.toLowerCase(),
      verdictCell: first.querySelector('[data-c="verdict"]'),
      claims: claims.map((row) => ({
        row,
        verdict: row.dataset.verdict,
        text: row.textContent.toLowerCase(),
        cells: Object.fromEntries(
          [...row.querySelectorAll("[data-c]")].map((c) => [
            c.dataset.c, c.dataset.v === undefined ? null : +c.dataset.v])),
      })),
    };
  });
  const judged = papers.flatMap((p) => p.claims)
    .filter((c) => c.verdict !== "to run").length;

  const says = (verdict, wanted) =>
    !wanted || verdict === wanted ||
    (wanted === "any" && !["to run", "not yet"].includes(verdict));

  let announce;
  function filter() {
    const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = form.verdict.value;
    const holds = (text) => words.every((word) => text.includes(word));
    let nPapers = 0, nClaims = 0;
    for (const p of papers) {
      const inRoom = !form.room.value || p.data.room === form.room.value;
      const whole = holds(p.text);
      let some = 0;
      for (const c of p.claims) {
        const keep = inRoom && says(c.verdict, wanted) &&
          (whole || holds(`${p.text} ${c.text}`));
        c.row.hidden = !keep;
        if (keep) some += 1;
        if (keep && c.verdict !== "to run") nClaims += 1;
      }
      const keep = p.claims.length
        ? some > 0 : inRoom && whole && says(p.data.verdict, wanted);
      p.body.hidden = !keep;
      if (keep) nPapers += 1;
    }
    const text = `${nPapers} of ${papers.length} papers, ` +
      `${nClaims} of ${judged} judged claims.`;
    clearTimeout(announce);
    announce = setTimeout(() => { shown.textContent = text; }, 150);
    const query = new URLSearchParams();
    for (const name of ["q", "room", "verdict"]) {
      if (form[name].value) query.set(name, form[name].value);
    }
    const tail = query.size ? `?${query}` : "";
    try {
      history.replaceState(null, "", location.pathname + tail + location.hash);
    } catch { /* pages opened as files may not rewrite their address */ }
  }

  const OF_PAPER = new Set(["paper", "title", "room", "chapter", "claims"]);
  const compare = (a, b, way) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return way * (typeof a === "number"
      ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  const best = (values, way) => values.filter((v) => v !== null)
    .sort((a, b) => way * (a - b))[0] ?? null;

  function sort(head) {
    const key = head.dataset.c;
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    const value = (p) => {
      if (OF_PAPER.has(key)) return p.data[key];
      if (key === "verdict") return +p.verdictCell.dataset.v;
      return best(p.claims.map((c) => c.cells[key] ?? null), way);
    };
    const ordered = papers.map((p) => [value(p), p])
      .sort((a, b) => compare(a[0], b[0], way));
    for (const [, p] of ordered) {
      if (!OF_PAPER.has(key) && p.claims.length) {
        const rows = [...p.claims].sort((a, b) =>
          compare(a.cells[key] ?? null, b.cells[key] ?? null, way));
        for (const c of rows) p.body.append(c.row);
      }
      table.append(p.body);
    }
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head));
    head.replaceChildren(button);
  }
  const query = new URLSearchParams(location.search);
  for (const name of ["q", "room", "verdict"]) {
    if (query.has(name)) form[name].value = query.get(name);
  }
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  if (query.size) filter();
  board.dataset.ready = "";
});
