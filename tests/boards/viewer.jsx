// Draws a dashboard of Grafana's JSON with Grafana's own components, from answers that Prometheus gave: draw(board,
// answers) for one page. Frames, units, thresholds, overrides and transformations are those of @grafana/data; panels
// of @grafana/ui. Its heatmap is no part of that package: it is drawn here, with its units and its look.

import {
  FieldType,
  Registry,
  applyFieldOverrides,
  createTheme,
  dateTime,
  getDisplayProcessor,
  getFieldDisplayValues,
  renderMarkdown,
  standardTransformers,
  standardTransformersRegistry,
  transformDataFrame,
} from "@grafana/data";
import { BigValue } from "grafana-ui/components/BigValue/BigValue.mjs";
import { PanelChrome } from "grafana-ui/components/PanelChrome/PanelChrome.mjs";
import { Table } from "grafana-ui/components/Table/Table.mjs";
import { TimeSeries } from "grafana-ui/graveyard/TimeSeries/TimeSeries.mjs";
import { GlobalStyles } from "grafana-ui/themes/GlobalStyles/GlobalStyles.mjs";
import { ThemeContext } from "@grafana/data";
import { Component } from "react";
import { flushSync } from "react-dom";
import { createRoot } from "react-dom/client";
import { firstValueFrom } from "rxjs";

const COLUMN = 58;
const ROW = 38;
const GAP = 8;
const STANDARD = ["unit", "min", "max", "decimals", "displayName", "noValue", "color", "thresholds", "mappings", "links"];

// Some stand there under an old and a new name.
const transformers = new Map(Object.values(standardTransformers).map((one) => [one.id, one]));
standardTransformersRegistry.setInit(() =>
  [...transformers.values()].map((one) => ({
    id: one.id,
    aliasIds: one.aliasIds,
    name: one.name ?? one.id,
    description: "",
    editor: () => null,
    transformation: one,
  })),
);

/** The field options that a panel may set: those of every panel and its own. */
function registryOf(panel) {
  const own = Object.keys(panel.fieldConfig?.defaults?.custom ?? {});
  const overridden = (panel.fieldConfig?.overrides ?? []).flatMap((each) => each.properties.map(({ id }) => id));
  const custom = new Set([...own, ...overridden.filter((id) => id.startsWith("custom.")).map((id) => id.slice(7))]);
  const item = (id, path, isCustom) => ({ id, path, isCustom, process: (value) => value, shouldApply: () => true });
  return new Registry(() => [
    ...STANDARD.map((id) => item(id, id, false)),
    ...[...custom].map((name) => item(`custom.${name}`, name, true)),
  ]);
}

function legendOf(format, labels) {
  if (format && format !== "__auto") return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");
  const { __name__: metric = "", ...rest } = labels;
  const inner = Object.entries(rest).map(([name, value]) => `${name}="${value}"`);
  return inner.length ? `${metric}{${inner.join(", ")}}` : metric || "Value";
}

/** One frame a series. */
function seriesFrames({ target, result }) {
  return result.map(({ metric, values }) => ({
    refId: target.refId,
    length: values.length,
    fields: [
      { name: "Time", type: FieldType.time, config: { interval: 1000 }, values: values.map(([at]) => at * 1000) },
      {
        name: "Value",
        type: FieldType.number,
        config: { displayNameFromDS: legendOf(target.legendFormat, metric) },
        labels: metric,
        values: values.map(([, value]) => Number(value)),
      },
    ],
  }));
}

/** One frame for all: a column a label, and the value. */
function tableFrame({ target, result }, several) {
  const names = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const value = several ? `Value #${target.refId}` : "Value";
  return {
    refId: target.refId,
    length: result.length,
    fields: [
      { name: "Time", type: FieldType.time, config: {}, values: result.map((row) => row.value[0] * 1000) },
      ...names.map((name) => ({
        name,
        type: FieldType.string,
        config: { filterable: true },
        values: result.map((row) => row.metric[name] ?? ""),
      })),
      { name: value, type: FieldType.number, config: {}, values: result.map((row) => Number(row.value[1])) },
    ],
  };
}

/** What the panel's plugin fills in where a dashboard says nothing, as Grafana does when it loads one. */
function configOf({ type, fieldConfig }) {
  const mode = type === "timeseries" ? "palette-classic" : "thresholds";
  const { defaults = {}, overrides = [] } = fieldConfig ?? {};
  return { defaults: { color: { mode }, ...defaults }, overrides };
}

async function framesOf(panel, answers, theme) {
  const isTable = panel.type === "table";
  const raw = isTable ? answers.map((each) => tableFrame(each, answers.length > 1)) : answers.flatMap(seriesFrames);
  const context = { interpolate: (text) => text };
  const data = await firstValueFrom(transformDataFrame(panel.transformations ?? [], raw, context));
  return applyFieldOverrides({
    data,
    fieldConfig: configOf(panel),
    fieldConfigRegistry: registryOf(panel),
    replaceVariables: (text) => text,
    theme,
    timeZone: "utc",
  });
}

function Stat({ panel, frames, theme, width, height }) {
  const found = getFieldDisplayValues({
    fieldConfig: configOf(panel),
    reduceOptions: panel.options.reduceOptions,
    replaceVariables: (text) => text,
    theme,
    data: frames,
    timeZone: "utc",
  });
  const wide = found.length > 1 && width > height * 2;
  const size = wide ? { width: width / found.length, height } : { width, height: height / Math.max(1, found.length) };
  const { textMode, colorMode, graphMode, justifyMode } = panel.options;
  return (
    <div style={{ display: "flex", flexDirection: wide ? "row" : "column" }}>
      {found.map(({ display }, i) => (
        <BigValue key={i} theme={theme} value={display} {...size} count={found.length}
          textMode={textMode} colorMode={colorMode} graphMode={graphMode} justifyMode={justifyMode} />
      ))}
    </div>
  );
}

/** Counts of a classic histogram by time and bucket: shade is the count, the axis says the buckets' upper bounds. */
function Heatmap({ frames, panel, theme, width, height }) {
  const columns = frames
    .map(({ fields }) => ({ le: Number(fields[1].labels.le.replace("+Inf", "Infinity")), times: fields[0].values, values: fields[1].values }))
    .sort((one, other) => one.le - other.le);
  const times = columns[0]?.times ?? [];
  const cells = columns.map(({ values }, i) => values.map((value, t) => Math.max(0, value - (columns[i - 1]?.values[t] ?? 0))));
  const top = Math.max(...cells.flat(), 1e-9);
  const left = 64;
  const bottom = 22;
  const wide = (width - left) / Math.max(1, times.length);
  const high = (height - bottom) / Math.max(1, cells.length);
  const format = getDisplayProcessor({ field: { type: FieldType.number, config: { unit: panel.options.yAxis?.unit ?? "short" } }, theme });
  const label = ({ text, suffix = "" }) => `${text}${suffix}`;
  return (
    <svg width={width} height={height} style={{ fontSize: 11, fill: theme.colors.text.secondary }}>
      {cells.map((row, i) => (
        <g key={columns[i].le}>
          <text x={left - 6} y={height - bottom - i * high + 4 - high / 2} textAnchor="end">
            {Number.isFinite(columns[i].le) ? `≤ ${label(format(columns[i].le))}` : `> ${label(format(columns[i - 1]?.le ?? 0))}`}
          </text>
          {row.map((count, t) =>
            count > 0 ? (
              <rect key={t} x={left + t * wide} y={height - bottom - (i + 1) * high} width={wide + 0.4} height={high - 1}
                fill={theme.visualization.getColorByName("dark-blue")} fillOpacity={0.12 + 0.88 * Math.sqrt(count / top)} />
            ) : null,
          )}
        </g>
      ))}
      {[0, 0.5, 0.95].map((share) => (
        <text key={share} x={left + share * (width - left)} y={height - 6}>
          {times.length ? dateTime(times[Math.floor(share * (times.length - 1))]).utc().format("HH:mm:ss") : ""}
        </text>
      ))}
    </svg>
  );
}

class Guarded extends Component {
  state = { error: null };
  static getDerivedStateFromError(error) {
    return { error };
  }
  componentDidCatch(error) {
    window.drawn[this.props.title] = { error: String(error) };
  }
  render() {
    return this.state.error ? <pre>{String(this.state.error)}</pre> : this.props.children;
  }
}

function Content({ panel, frames, theme, width, height, range }) {
  if (panel.type === "text") return <div className="markdown-html" dangerouslySetInnerHTML={{ __html: renderMarkdown(panel.options.content) }} />;
  if (!frames.some(({ length }) => length)) return <p>No data</p>;
  if (panel.type === "stat") return <Stat {...{ panel, frames, theme, width, height }} />;
  if (panel.type === "heatmap") return <Heatmap {...{ panel, frames, theme, width, height }} />;
  if (panel.type === "table") return <Table data={frames[0]} width={width} height={height} cellHeight={panel.options.cellHeight} />;
  return <TimeSeries frames={frames} timeRange={range} timeZone="utc" width={width} height={height} theme={theme} legend={panel.options.legend} structureRev={1} />;
}

function Panel({ panel, frames, theme, range }) {
  const { w, h } = panel.gridPos;
  const size = { width: w * COLUMN - GAP, height: h * ROW - GAP };
  return (
    <PanelChrome title={panel.title} description={panel.description} {...size} padding={panel.type === "table" ? "none" : "md"}>
      {(width, height) => (
        <Guarded title={panel.title}>
          <Content {...{ panel, frames, theme, range, width, height }} />
        </Guarded>
      )}
    </PanelChrome>
  );
}

/**
 * Draws a board into the page, and says in window.drawn what each panel showed.
 * @param board as committed  @param answers by the panel's id: {target, result} of each query  @param range [from, to], ms
 */
window.draw = async (board, answers, [from, to], mode) => {
  window.drawn = {};
  const theme = createTheme({ colors: { mode } });
  document.body.style.background = theme.colors.background.canvas;
  const range = { from: dateTime(from), to: dateTime(to), raw: { from: "now-5m", to: "now" } };
  const drawn = [];
  for (const panel of board.panels) {
    if (panel.type === "row") {
      drawn.push({ panel });
      continue;
    }
    const frames = await framesOf(panel, answers[panel.id] ?? [], theme);
    const numbers = frames.flatMap(({ fields }) => fields.filter(({ type }) => type === FieldType.number));
    const values = numbers.flatMap(({ values }) => [...values]).filter((value) => Number.isFinite(value)).length;
    const rows = panel.type === "table" ? (frames[0]?.length ?? 0) : 0;
    window.drawn[panel.title] = { type: panel.type, series: frames.length, values, rows };
    drawn.push({ panel, frames });
  }
  const bottom = Math.max(...board.panels.map(({ gridPos: { y, h } }) => y + h));
  const style = { position: "relative", width: 24 * COLUMN, height: bottom * ROW, color: theme.colors.text.primary };
  const root = createRoot(document.getElementById("root"));
  flushSync(() =>
    root.render(
      <ThemeContext.Provider value={theme}>
        <GlobalStyles />
        <div id="board" style={style}>
          {drawn.map(({ panel, frames }) => (
            <div key={panel.id} data-panel={panel.title}
              style={{ position: "absolute", left: panel.gridPos.x * COLUMN, top: panel.gridPos.y * ROW }}>
              {frames ? <Panel {...{ panel, frames, theme, range }} /> : <h2 style={{ margin: 0, fontSize: 18, lineHeight: "34px" }}>{panel.title}</h2>}
            </div>
          ))}
        </div>
      </ThemeContext.Provider>,
    ),
  );
  return [24 * COLUMN, bottom * ROW];
};
