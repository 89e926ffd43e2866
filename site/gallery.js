// The pictures of this browser, kept over a reload in IndexedDB.

const MOST = 200;

const promised = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const opened = (async () => {
  const request = indexedDB.open('nano', 1);
  request.onupgradeneeded = () => request.result.createObjectStore('pictures', { keyPath: 'key', autoIncrement: true });
  return promised(request);
})();
opened.catch(() => {}); // where a browser gives none, or throws: pictures are then kept until the page closes

const store = async (mode) => (await opened).transaction('pictures', mode).objectStore('pictures');

/** All pictures, the newest first: [{key, png, settings}]. */
export const all = async () => (await promised((await store('readonly')).getAll())).reverse();

/** Keep a picture; the oldest go when there are too many. */
export async function add(picture) {
  const pictures = await store('readwrite');
  const key = await promised(pictures.add(picture));
  const keys = await promised(pictures.getAllKeys());
  for (const old of keys.slice(0, Math.max(0, keys.length - MOST))) pictures.delete(old);
  return key;
}

export const clear = async () => promised((await store('readwrite')).clear());
