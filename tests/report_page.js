// What tests ask of a report's page; the browser evaluates this file, and then calls one of its functions.
const all = (selector) => [...document.querySelectorAll(selector)];

const figure = (title) => all("figure").find((node) => node.querySelector("h3").textContent === title);

// Boxes that reach out of the window, without those that scroll on their own.
const outside = () => all("figure, .card, table, select, input, button, h1, h2, h3, p, pre, .row").filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !node.closest(".scroll, nav");
}).map((node) => node.outerHTML.slice(0, 80));

// Words of one chart that lie over each other.
const meeting = () => all("svg").flatMap((image) => {
  const boxes = [...image.querySelectorAll("text")].map((node) => [node.textContent, node.getBoundingClientRect()]);
  const over = (one, two) => one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 3 && two.top < one.bottom - 3;
  return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([, two]) => over(one, two)).map(([b]) => `${image.ariaLabel}: ${a} | ${b}`));
});

// The least contrast of a text with what is behind it, as WCAG 2 has it, and the text.
function contrast() {
  const part = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  function behind(node) {
    for (; node; node = node.parentElement) {
      const ground = rgb(getComputedStyle(node).backgroundColor);
      if (ground.length === 3 || ground[3] > 0.9) return ground.slice(0, 3);
    }
    return [255, 255, 255];
  }
  const texts = all("h1, h2, h3, p, a, dt, dd, td, th, summary, .row span, svg text").filter((node) => node.textContent.trim());
  return texts.map((node) => {
    const style = getComputedStyle(node);
    const ink = light(rgb(node.closest("svg") ? style.fill : style.color)), ground = light(behind(node));
    return [(Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05), node.textContent.slice(0, 40)];
  }).sort((x, y) => x[0] - y[0])[0];
}

const background = () => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
const overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
const texts = (selector) => all(selector).map((node) => node.textContent);
const inks = () => [...new Set(all(".t").map((node) => node.style.backgroundColor))];
const count = () => document.querySelector(".filters [role=status]").textContent;
const reader = () => document.querySelector(".read").innerText;
const legend = (title) => [...figure(title).querySelectorAll(".legend li")].map((node) => node.textContent);
const tip = (title) => figure(title).querySelector(".tip").textContent;
const points = (title) => figure(title).querySelector("path[stroke-width]").getAttribute("d").split("L").length;
const rows = (title) => figure(title).querySelectorAll("tbody tr").length;
const drawn = () => all("figure .plot").every((plot) => plot.childElementCount);
