// Starts the page: asks what the server can do, and shows what goes with that.

import { startAdding } from "./page-adding.js";
import { byId, tell } from "./page-elements.js";
import { startLoad } from "./page-load.js";
import { makePickers, refreshPickers } from "./page-picker.js";
import { startPlayground } from "./page-playground.js";
import { askJson, offerKey } from "./page-server.js";
import { startTasks } from "./page-tasks.js";

async function start() {
  const health = await askJson("/health");
  byId("run").textContent = health.name;
  document.title = `${health.name}: polyroute`;
  makePickers();
  startPlayground(health);
  startAdding(health);
  startTasks(health);
  const look = startLoad();
  offerKey(() => {
    refreshPickers();
    look();
  });
  refreshPickers();
}

start().catch((error) => {
  byId("trouble").hidden = false;
  tell(byId("trouble"), error.message, true);
});
