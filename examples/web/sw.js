// Files come from the network; without one, from what the page has kept.
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const kept = async (error) => {
    const response = await caches.match(event.request, { ignoreSearch: true });
    if (response) return response;
    throw error;
  };
  event.respondWith(fetch(event.request).catch(kept));
});
