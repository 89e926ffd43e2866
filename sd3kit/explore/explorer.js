(function find(start, tries) {
  // ipywidgets gives the handles of its sliders no name, and replaces whatever stands in an HTML widget, so that a live
  // region inside is new each time and not announced. This names the handles after their labels and makes the status
  // line's lasting container the live region. A download link that had the focus when a new picture replaced it hands
  // the focus to the next one. Where scripts do not run the explorer works without.
  var root = start.closest('.sd3kit-explorer');
  if (!root && tries) { setTimeout(function () { find(start, tries - 1); }, 100); }
  if (!root || root.named) { return; }
  root.named = true;
  function name() {
    root.querySelectorAll('.widget-hslider').forEach(function (slider) {
      var label = slider.querySelector('.widget-label');
      slider.querySelectorAll('[role=slider], .ui-slider-handle').forEach(function (handle) {
        handle.setAttribute('aria-label', label.textContent);
      });
      slider.querySelectorAll('.widget-readout').forEach(function (box) {
        box.setAttribute('role', 'textbox');
        box.setAttribute('aria-label', label.textContent + ', as a number');
      });
    });
    root.querySelectorAll('.sd3kit-said > .widget-html-content').forEach(function (line) {
      line.setAttribute('aria-live', 'polite');
    });
  }
  var link = null;
  document.addEventListener('focusin', function (event) {
    link = root.contains(event.target) && event.target.matches('a[download]') ? event.target : null;
  });
  root.addEventListener('focusout', function () {
    setTimeout(function () { if (link && link.isConnected && document.activeElement !== link) { link = null; } });
  });
  function follow() {
    var next = root.querySelector('a[download]');
    if (link && next && next !== link && document.activeElement === document.body) { next.focus(); }
  }
  new MutationObserver(function () { name(); follow(); }).observe(root, {childList: true, subtree: true});
  name();
})(this, 100)
