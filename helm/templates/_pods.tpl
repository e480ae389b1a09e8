{{/* What the pods are made of. */}}

{{- define "latentwatch.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser }}
runAsGroup: {{ .Values.runAsUser }}
fsGroup: {{ .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Complete by itself: in a patched pod there is no pod security context of ours. */}}
{{- define "latentwatch.containerSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser }}
runAsGroup: {{ .Values.runAsUser }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "latentwatch.watchlistPath" -}}
{{- $source := .Values.watchlist -}}
/etc/latentwatch/watchlist/{{ with $source.configMap }}{{ .key }}{{ end }}{{ with $source.persistentVolumeClaim }}{{ .path }}{{ end }}{{ with $source.image }}{{ .path }}{{ end }}
{{- end -}}

{{- define "latentwatch.watchlistMount" -}}
- name: latentwatch-watchlist
  mountPath: /etc/latentwatch/watchlist
  readOnly: true
{{- end -}}

{{- define "latentwatch.watchlistVolume" -}}
- name: latentwatch-watchlist
{{- with .Values.watchlist.configMap }}
  configMap:
    name: {{ .name }}
    items:
      - key: {{ .key }}
        path: {{ .key }}
{{- end }}
{{- with .Values.watchlist.persistentVolumeClaim }}
  persistentVolumeClaim:
    claimName: {{ .claimName }}
    readOnly: true
{{- end }}
{{- with .Values.watchlist.image }}
  image:
    reference: {{ .reference | quote }}
    pullPolicy: {{ default "IfNotPresent" .pullPolicy }}
{{- end }}
{{- end -}}

{{/* Options of `latentwatch collector`, as a list. */}}
{{- define "latentwatch.collectorArgs" -}}
- --watchlist={{ include "latentwatch.watchlistPath" . }}
{{- if eq .Values.mode "sidecar" }}
- --listen=unix:///run/latentwatch/collector.sock
{{- else }}
- --listen={{ .Values.collector.bindAddress }}:{{ .Values.collector.grpcPort }}
{{- end }}
- --state=/var/lib/latentwatch/state
- --http={{ .Values.collector.bindAddress }}:{{ .Values.collector.httpPort }}
{{- range .Values.collector.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What the collector's container has in both modes, behind its name, command and probes. */}}
{{- define "latentwatch.collectorContainer" -}}
image: {{ include "latentwatch.image" (list .Values.image .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.collector.extraEnv }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.collector.resources | nindent 2 }}
securityContext:
  {{- include "latentwatch.containerSecurityContext" . | nindent 2 }}
{{- end -}}

{{- define "latentwatch.collectorMounts" -}}
{{ include "latentwatch.watchlistMount" . }}
- name: latentwatch-data
  mountPath: /var/lib/latentwatch
- name: latentwatch-tmp
  mountPath: /tmp
{{- with .Values.collector.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "latentwatch.collectorVolumes" -}}
{{ include "latentwatch.watchlistVolume" . }}
- name: latentwatch-data
{{- with .Values.state.persistence }}
{{- if .enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-collector" (include "latentwatch.fullname" $)) .existingClaim }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
- name: latentwatch-tmp
  emptyDir: {}
{{- with .Values.collector.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
