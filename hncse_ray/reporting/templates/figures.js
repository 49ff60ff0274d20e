// The numbers under the pointer, or of the point that the arrow keys are at. Without this the figures are as readable.
for (const script of document.querySelectorAll("script.figure")) {
  const { traces, place } = JSON.parse(script.textContent);
  const svg = document.getElementById("figure-" + script.dataset.name);
  const readout = script.previousElementSibling;
  const points = [...new Set(traces.flatMap((t) => t.x))].filter((x) => typeof x === "number").sort((a, b) => a - b);
  if (!points.length) continue;
  const number = (v) => (place.log ? Math.log10(v) : v);
  const at = (v) => place.left + ((number(v) - place.low) / (place.high - place.low)) * (place.right - place.left);
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
  mark.setAttribute("class", "mark");
  let now = -1;
  const show = (i) => {
    now = Math.max(0, Math.min(points.length - 1, i));
    const x = points[now];
    const box = svg.viewBox.baseVal;
    for (const [name, value] of [["x1", at(x)], ["x2", at(x)], ["y1", 0], ["y2", box.height]]) mark.setAttribute(name, value);
    svg.append(mark);
    const said = traces.slice(0, 12).map((t) => [t.name, t.y[t.x.indexOf(x)]]).filter(([, y]) => typeof y === "number");
    readout.textContent = x.toLocaleString("en") + ": " + said.map(([n, y]) => (n ? n + " " : "") + Number(y.toPrecision(5))).join(", ");
  };
  svg.addEventListener("pointermove", (event) => {
    const x = (event.offsetX / svg.clientWidth) * place.width;
    show(points.reduce((best, p, i) => (Math.abs(at(p) - x) < Math.abs(at(points[best]) - x) ? i : best), 0));
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(step === -Infinity ? 0 : step === Infinity ? points.length - 1 : now + step);
  });
}
