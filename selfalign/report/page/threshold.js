// Move a threshold. Everything was counted in advance; the page is complete without this.
(() => {
  const box = document.querySelector('.twin')
  if (!box) return
  const data = JSON.parse(box.dataset.twin), panels = [...box.querySelectorAll('.panel')]
  const scorer = document.getElementById('twin-scorer'), kind = document.getElementById('twin-kind')
  const share = v => v < 0 ? '–' : `${(v/10).toFixed(1)} %`
  const range = (low, high) => low < 0 ? '' : `[${(low/10).toFixed(1)}, ${(high/10).toFixed(1)}]`
  const make = (tag, text, name) => { const o = document.createElement(tag); o.textContent = text; if (name) o.className = name; return o }
  const caption = card => document.getElementById(`pair-${card}`).querySelector('blockquote').textContent
  function row(k, n, [kept, precision, low, high, below, recall, random, from, to], threshold) {
    const tr = document.createElement('tr'), head = make('th', data.kinds[k])
    const cell = (text, range, name = 'num') => { const td = make('td', text + ' ', name); if (range) td.append(make('span', range, 'range')); return td }
    head.scope = 'row'
    tr.append(cell(threshold), head, cell(`${kept} of ${n}`), cell(share(n ? 1000*kept/n : -1)))
    if (data.known) tr.append(cell(share(precision), range(low, high)), cell(share(below)), cell(share(recall)), cell(share(random), range(from, to), 'num chance'))
    const labels = ['threshold', 'images', 'kept', 'share', 'true above', 'true below', 'recall', 'random drop']
    ;[...tr.children].forEach((o, i) => { o.dataset.label = labels[i] })
    return tr
  }
  function pair(p, s) {
    const li = document.createElement('li'), columns = +box.dataset.columns, truth = ['✗ something else', '✓ as the caption says'][p[3]] || ''
    const what = data.kinds[p[2]], tile = make('span', p[1] < 0 ? 'not shown' : '', p[1] < 0 ? 'empty' : 'tile sheet'), words = make('blockquote', '')
    if (p[1] >= 0) {
      tile.setAttribute('role', 'img'); tile.setAttribute('aria-label', `${what} image for: ${caption(p[0])}`)
      tile.style.setProperty('--x', p[1] % columns); tile.style.setProperty('--y', Math.floor(p[1]/columns))
    }
    words.append(make('bdi', caption(p[0])))
    li.append(tile, make('b', `${p[4 + 2*s].toFixed(2)} ${what}`), make('i', truth), words)
    return li
  }
  function show() {
    const chosen = scorer ? +scorer.value : 0, choice = kind ? +kind.value : 0, kinds = data.kinds.map((_, k) => k).filter(k => !choice || k === choice - 1)
    panels.forEach((panel, s) => {
      panel.hidden = s !== chosen
      if (panel.hidden) return
      const input = panel.querySelector('input'), t = +input.value, {low, high, ends, counts, states} = data.scorers[s]
      const part = t/(states.length - 1), threshold = (low + part*(high - low)).toFixed(2)
      const kept = kinds.reduce((n, k) => n + states[t][k][0], 0), all = kinds.reduce((n, k) => n + counts[k], 0)
      const said = `Threshold ${threshold}: ${kept} of ${all} pairs kept, ${share(all ? 1000*kept/all : -1)}`
      for (const plot of panel.querySelectorAll('.plot')) plot.hidden = +plot.dataset.choice !== choice
      for (const cut of panel.querySelectorAll('.cut')) cut.setAttribute('transform', `translate(${ends[0] + part*(ends[1] - ends[0])} 0)`)
      input.setAttribute('aria-valuetext', said); panel.querySelector('.readout').textContent = said
      panel.querySelector('.live').replaceChildren(...kinds.map(k => row(k, counts[k], states[t][k], threshold)))
      const near = data.pairs.filter(p => kinds.includes(p[2])).sort((a, b) => a[4 + 2*s] - b[4 + 2*s]), [above, below] = panel.querySelectorAll('.sides ol')
      above.replaceChildren(...near.filter(p => p[5 + 2*s] >= t).slice(0, 4).map(p => pair(p, s)))
      below.replaceChildren(...near.filter(p => p[5 + 2*s] < t).reverse().slice(0, 4).map(p => pair(p, s)))
    })
  }
  for (const o of box.querySelectorAll('.controls, .slide, .readout, .live')) o.hidden = false
  for (const o of box.querySelectorAll('.still')) o.hidden = true
  for (const o of [scorer, kind]) if (o) o.addEventListener('change', show)
  for (const panel of panels) panel.querySelector('input').addEventListener('input', show)
  show()
})()
