// Sort and filter the gallery. The page is complete without this.
(() => {
  const list = document.querySelector('.cards'), box = document.querySelector('.controls:has(#sort)')
  if (!list || !box) return
  const cards = [...list.children], step = 24, more = document.getElementById('more')
  const [sort, order, subset, noise] = ['sort', 'order', 'subset', 'noise'].map(id => document.getElementById(id))
  const count = document.getElementById('count')
  let shown = step
  const value = card => { const v = parseFloat(card.dataset[sort.value]); return isNaN(v) ? null : v }
  const passes = card => (!subset || !subset.value || card.dataset.subset === subset.value) &&
    (!noise || !noise.value || (noise.value === 'clean') === !card.dataset.noise)
  function compare(a, b) {
    if (sort.value === 'drawn') return a.dataset.drawn - b.dataset.drawn
    const x = value(a), y = value(b)
    if (x === null || y === null) return (x === null) - (y === null) || a.dataset.drawn - b.dataset.drawn
    return (order.value === 'up' ? x - y : y - x) || a.dataset.drawn - b.dataset.drawn
  }
  function update() {
    const kept = cards.filter(passes).sort(compare)
    for (const card of cards) card.hidden = true
    kept.slice(0, shown).forEach(card => { card.hidden = false; list.append(card) })
    count.textContent = `${Math.min(shown, kept.length)} of ${kept.length} pairs`
    more.hidden = kept.length <= shown
    order.disabled = sort.value === 'drawn'
  }
  for (const select of [sort, order, subset, noise]) if (select) select.addEventListener('change', () => { shown = step; update() })
  more.addEventListener('click', () => { shown += step; update() })
  box.hidden = false
  update()
})()
