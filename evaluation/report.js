const all = (s, root = document) => [...root.querySelectorAll(s)];
const metric = document.getElementById('metric');
const choose = () => all('[data-metric]').forEach(p => p.hidden = p.dataset.metric !== metric.value);
if (metric) { metric.onchange = choose; choose(); }
all('.keys button').forEach(b => b.onclick = () => {
  const on = b.ariaPressed !== 'true'; b.ariaPressed = on;
  all('.s' + b.value).forEach(e => e.style.display = on ? '' : 'none'); });
all('table[id]').forEach(table => all('th', table).forEach((th, column) => th.onclick = () => {
  const body = th.closest('table').tBodies[0], up = th.dataset.up = th.dataset.up === '1' ? '' : '1';
  const key = row => { const t = row.cells[column].textContent, x = parseFloat(t); return isNaN(x) ? t : x; };
  [...body.rows].sort((a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (up ? 1 : -1))
    .forEach(row => body.append(row)); }));
