// Before the first paint, so that a dark page never flashes white.
;(function () {
  var stored = localStorage.getItem('attnscope.theme')
  var dark =
    stored === 'dark' ||
    (stored !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches)
  document.documentElement.classList.add(dark ? 'dark' : 'light')
})()
