"use strict";
// Runs the script of the page of the API: `node page.js PAGE OPENAPI`. Fills in each form, sends it, and prints what
// the page shows and asks for. What follows is as much of a browser as the page needs.
const fs = require("fs");
const [, , page, openapi] = process.argv;

class Element {
  constructor(tag) { Object.assign(this, {tag, children: [], attributes: {}, listeners: {}, hidden: false, typed: undefined}); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  toggleAttribute(name, on) { if (on) this.attributes[name] = ""; else delete this.attributes[name]; }
  get id() { return this.attributes.id; }
  get value() {
    const chosen = this.children.find((child) => "selected" in (child.attributes ?? {})) ?? this.children[0];
    return this.typed ?? chosen?.attributes?.value ?? "";
  }
  set value(text) { this.typed = text; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  get textContent() { return this.children.map((child) => child.textContent ?? child).join(""); }
  set textContent(text) { this.children = [text]; }
  all(tag) { return this.children.flatMap((child) => (child instanceof Element ? [...(child.tag === tag ? [child] : []), ...child.all(tag)] : [])); }
}

const text = fs.readFileSync(page, "utf8");
const byId = Object.fromEntries([...text.matchAll(/ id="(\w+)"/g)].map(([, id]) => [id, new Element("div")]));
const asked = [];
globalThis.location = {href: "http://gateway/docs"};
globalThis.document = {title: "", createElement: (tag) => new Element(tag), getElementById: (id) => byId[id]};
globalThis.fetch = async (url, options) => {
  if (url === "openapi.json") return {ok: true, json: async () => JSON.parse(fs.readFileSync(openapi, "utf8"))};
  asked.push({url, method: options.method, headers: options.headers});
  return {ok: true, status: 200, headers: new Headers({"content-type": "application/json"}), text: async () => "{}"};
};

async function main() {
  (0, eval)(/<script>(.*?)<\/script>/s.exec(text)[1]);
  await new Promise(setImmediate);
  const sections = byId.operations.children;
  byId.key.value = "secret";
  for (const section of sections) {
    for (const input of section.all("input")) input.value = "a b";
    for (const form of section.all("form")) await form.listeners.submit({preventDefault() {}});
  }
  const titles = sections.map((section) => section.all("h2")[0].children.slice(0, 2).map((part) => part.textContent).join(" "));
  const commands = sections.flatMap((section) => section.all("details").filter((each) => each.textContent.includes("curl")).map((each) => each.all("pre")[0].textContent));
  console.log(JSON.stringify({titles, commands, asked, keys: !byId.keys.hidden}));
}

main();
